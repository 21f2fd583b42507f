"""Batches of token sequences: how many examples, cut into micro-batches, repeat for several probes.

A batch is a dictionary of tensors. Every tensor has either one entry per example or one per sequence; sequences of one example
are neighbours. ``example`` (shape ``[sequences]``), where present, names each sequence's example; without it there is one
sequence per example. Values that are not tensors are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]


def size(batch: Batch) -> int:
    """Number of examples."""
    return int(batch["label"].shape[0]) if "label" in batch else int(batch["input_ids"].shape[0])


def split(batch: Batch, micro_batch_size: int | None) -> Iterator[Batch]:
    """Cut a batch into micro-batches of at most ``micro_batch_size`` examples, in order."""
    examples = size(batch)
    if micro_batch_size is None or examples <= micro_batch_size:
        yield batch
        return
    per_example = {key: value.shape[0] for key, value in batch.items() if isinstance(value, Tensor)}
    for start in range(0, examples, micro_batch_size):
        stop = min(start + micro_batch_size, examples)
        part = dict(batch)
        rows = slice(start, stop)
        if "example" in batch:
            low, high = (torch.searchsorted(batch["example"], edge).item() for edge in (start, stop))
            rows = slice(int(low), int(high))
        for key in per_example:
            sequences = "example" in batch and key in SEQUENCE_KEYS
            part[key] = batch[key][rows if sequences or "example" not in batch else slice(start, stop)]
        if "example" in batch:
            part["example"] = part["example"] - start
        yield part


#: Tensors with one entry per sequence; the others have one per example.
SEQUENCE_KEYS = frozenset({"input_ids", "attention_mask", "scored", "example", "choice", "correct"})


def repeat(batch: Batch, copies: int) -> Batch:
    """The batch ``copies`` times over, one whole copy after another."""
    if copies == 1:
        return batch
    examples = size(batch)
    out = {key: torch.cat([value] * copies) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if "example" in batch:
        out["example"] = torch.cat([batch["example"] + copy * examples for copy in range(copies)])
    return out

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
from torch.nn import functional as F

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
    for start in range(0, examples, micro_batch_size):
        yield cut(batch, start, min(start + micro_batch_size, examples))


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Examples ``start`` to ``stop`` of a batch."""
    rows = sequences = slice(start, stop)
    if "example" in batch:
        sequences = slice(_sequences(batch, start), _sequences(batch, stop))
    part = {key: value[sequences if key in SEQUENCE_KEYS else rows] if isinstance(value, Tensor) else value for key, value in batch.items()}
    if "example" in batch:
        part["example"] = part["example"] - start
    return part


def _sequences(batch: Batch, examples: int) -> int:
    """How many sequences the first examples have; without a look at the device where all have the same number."""
    sequences, whole = batch["example"].shape[0], size(batch)
    if sequences == whole or sequences == whole * batch.get("num_choices", 0):
        return examples * sequences // whole
    return int(torch.searchsorted(batch["example"], examples))


def bucket(batch: Batch) -> Batch:
    """Pad sequences on the left to one of few widths, so that few shapes occur.

    Widths are multiples of an eighth of the next power of two, at least of 16; ``max_scored`` becomes a power of two.
    """
    width = batch["input_ids"].shape[1]
    unit = max(16, _power_of_two(width) // 8)
    more = -width % unit if "attention_mask" in batch else 0  # without a mask a model would read the padding
    out = dict(batch)
    for name in ("input_ids", "attention_mask"):
        if name in batch:
            out[name] = F.pad(batch[name], (more, 0))
    if "max_scored" in batch:
        out["max_scored"] = min(_power_of_two(batch["max_scored"]), width + more - 1)
    return out


def with_padding(batch: Batch) -> Batch:
    """The batch with one token hidden, for rehearsals.

    A model that looks whether all tokens are visible then takes the way that it takes in a CUDA graph, where it cannot look.
    """
    if "attention_mask" not in batch:
        return batch
    mask = batch["attention_mask"].clone()
    mask[:1, :1].zero_()
    return {**batch, "attention_mask": mask}


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below it."""
    return 1 << max(number - 1, 0).bit_length()


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

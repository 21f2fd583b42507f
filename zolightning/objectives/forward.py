"""Run a causal language model and get logits only where they are scored."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.objectives.batch import Batch


@contextmanager
def forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules run other forwards; one that a module has of its own, as accelerate gives it on several devices, comes back."""
    own = {module: vars(module).get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in own.items():
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


@lru_cache(maxsize=64)
def _accepts(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _inner(model: Any) -> Any:
    """The model itself inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def last_logits(model: nn.Module, batch: Batch, positions: int) -> Tensor:
    """Logits at the last positions of left-padded sequences, through the model's own head.

    Args:
        model: Causal language model as of transformers (or a peft model around one).
        batch: ``input_ids`` and ``attention_mask``, both ``[R, T]``.
        positions: How many positions from the end.

    Returns:
        ``[R, positions, V]``, in the type that the model computes.
    """
    mask = batch["attention_mask"]
    inner = _inner(model)  # peft's own signature hides the model's
    accepted = _accepts(type(inner).forward)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if "position_ids" in accepted:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = positions
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=mask, **options).logits
    return logits[:, -positions:]


def candidate_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of ``candidates`` (``[R, K]``) at the last position; the model's head computes these alone where it is a plain matrix.

    What the model does with logits after its head (soft caps, scalings) is done to them too.

    Returns:
        ``[R, K]``, in the type that the model computes.
    """
    inner = _inner(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    candidates = batch["candidates"]
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):  # accelerate's has to run
        return last_logits(model, batch, 1)[:, -1].gather(1, candidates)

    def rows_of_the_head(hidden: Tensor) -> Tensor:
        return hidden @ F.embedding(candidates, head.weight).mT

    with forwards({head: rows_of_the_head}):
        return last_logits(model, batch, 1)[:, -1]


def wide(logits: Tensor) -> Tensor:
    """Logits in the precision of losses: float32, or float64 if they are that already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def scored_log_probs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of the scored tokens of each sequence.

    Args:
        model: Causal language model.
        batch: ``input_ids``, ``attention_mask`` (``[R, T]``) and ``scored`` (``[R]``): number of trailing tokens to score; the
            integer ``max_scored``, where present, saves a look at the device.

    Returns:
        Sum of log-probabilities and number of scored tokens, both ``[R]``.
    """
    scored = batch["scored"]
    longest = int(batch["max_scored"]) if "max_scored" in batch else int(scored.max())
    logits = wide(last_logits(model, batch, longest + 1)[:, :-1])
    targets = batch["input_ids"][:, -longest:]
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
    keep = torch.arange(longest, 0, -1, device=scored.device) <= scored.unsqueeze(-1)  # [R, longest]
    return picked.masked_fill(~keep, 0.0).sum(dim=-1), scored.to(picked.dtype)

"""Weights that bitsandbytes has packed: where their scales are, and what they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def scales_of(module: nn.Module) -> tuple[Any, str] | None:
    """The object that holds the scales of a module's packed weight, and under which name; ``None``: its weight is not packed."""
    weight, state = module._parameters.get("weight"), getattr(module, "state", None)
    if getattr(weight, "quant_state", None) is not None:
        return weight.quant_state, "absmax"  # type: ignore[union-attr]
    if weight is not None and weight.dtype == torch.int8 and getattr(state, "SCB", None) is not None:
        return state, "SCB"
    return None


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """Shape of a module's weight, unpacked."""
    weight: Any = module._parameters["weight"]
    return tuple(weight.quant_state.shape if getattr(weight, "quant_state", None) is not None else weight.shape)


def unpacked(module: nn.Module) -> Tensor:
    """A module's weight as numbers: a new tensor where it is packed."""
    weight: Any = module._parameters["weight"]
    found = scales_of(module)
    if found is None:
        return weight
    holder, leaf = found
    if leaf == "SCB":
        return weight.data * (holder.SCB.view(-1, 1) / 127)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, holder)

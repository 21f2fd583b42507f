"""Quantised models that the tests share: bitsandbytes' own kernels on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from nets import bits
from torch import nn

from zolightning.models import load_model
from zolightning.samplers import Direction
from zolightning.spaces import Space

#: What can be asked of ``load_model``.
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4"},
    "fp4": {"quantization": "fp4"},
    "nf4 double": {"quantization": "nf4", "double_quantization": True},
    "int8": {"quantization": "int8"},
}


def quantised(folder: str, kind: str, dtype: Any = "float32") -> nn.Module:
    """The model of a folder, quantised."""
    return load_model(folder, dtype, **KINDS[kind])


def packed_bits(model: nn.Module) -> dict[str, bytes]:
    """The raw bytes of all packed weights, by the name of their module."""
    return {_name(name): bits(p) for name, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}


def _name(name: str) -> str:
    """Without what adapters put around it."""
    return name.replace("base_layer.", "").replace(".base_layer", "").rpartition("layers.")[2]


def scale_bits(model: nn.Module) -> dict[str, bytes]:
    """The raw bytes of all scales of packed weights."""
    found = {}
    for name, module in model.named_modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is not None:
            found[_name(name)] = bits(state.absmax) + (bits(state.state2.absmax) if state.nested else b"")
        elif "weight" in module._parameters and hasattr(module, "state"):
            found[_name(name)] = bits(module.state.SCB)
    return found


@torch.no_grad()
def check_pair(space: Space, along: Direction) -> None:
    """Both signs in one forward are two probes, and the signs differ."""
    single, ids = [], torch.tensor([[5, 6, 7]])
    for sign in (1, -1):
        with space.probe(along, sign * 0.1):
            single.append(space.model(input_ids=ids).logits)
    with space.pair(along, 0.1):
        both = space.model(input_ids=ids.repeat(2, 1)).logits
    assert torch.allclose(both, torch.cat(single), atol=1e-5)
    assert not torch.allclose(*single, atol=1e-3)

"""Weights that are made where they are read, as compilers see them: one operation that knows nothing but shapes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.spaces.lazy import Source

_sources: dict[int, Source] = {}  # by the address of what stands for the weight


def routable(module: nn.Module) -> bool:
    """Whether a module is a plain linear map."""
    return type(module).forward is nn.Linear.forward or isinstance(module, Routed)


def ghost(weight: Tensor, source: Source) -> Tensor:
    """Stands for a matrix in a linear map that was :func:`route`-d: a NaN of its shape, so that no other reader goes unnoticed.

    Args:
        weight: The matrix, for its shape and type.
        source: Computes with the perturbed one.
    """
    made = torch.full((1, 1), torch.nan, dtype=weight.dtype, device=weight.device)
    _sources[made.data_ptr()] = source
    return made.expand(weight.shape)


def lay(made: Tensor) -> None:
    """Forget a ghost; harmless for other tensors."""
    _sources.pop(made.data_ptr(), None)


@torch.library.custom_op("zolightning::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map of ``x`` by the source of a ghost."""
    return _sources[weight.data_ptr()].linear(x, bias).contiguous()


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Routed(nn.Module):
    """A linear map whose weight is a ghost."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = linear(x, self._parameters["weight"], self._parameters["bias"])
        return made


@cache
def _routed(kind: Any) -> type[nn.Module]:
    return type(f"Routed{kind.__name__}", (Routed, kind), {})


def route(modules: Iterable[nn.Module]) -> None:
    """Let linear maps ask the source of their weight."""
    for module in modules:
        if not isinstance(module, Routed):
            module.__class__ = _routed(type(module))  # type: ignore[arg-type]


def unroute(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`route`; harmless where there is nothing to undo."""
    for module in modules:
        if isinstance(module, Routed):
            module.__class__ = type(module).__mro__[2]

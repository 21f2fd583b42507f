"""Both signs of a probe in one forward: a module sees the first half of its input with ``W + a z``, the second with ``W - a z``."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

_TWIN = "_zolightning_twin"


class LinearMap(nn.Module):
    """A linear map whose matrix is put together from its parameters; from pairs of them (``[2, ...]``) it puts together two."""

    bias: None = None

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, or the pair ``[2, out, in]``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The map."""
        return functional.linear(x, self.weight)


def pairable(modules: Iterable[nn.Module]) -> bool:
    """Whether modules can be split in halves: those with weights have no modules inside, and no packed weights."""
    return all(not module._modules and all(p is None or p.is_floating_point() for p in module._parameters.values()) for module in modules)


def pair(modules: Iterable[nn.Module]) -> None:
    """Let modules compute in halves; their parameters are then pairs ``[2, *shape]``, set by the probe."""
    for module in modules:
        if _TWIN not in module.__dict__:
            twin = copy.copy(module)
            twin._parameters = dict(module._parameters)
            module.__dict__[_TWIN] = twin
            module.__class__ = _paired(type(module))  # type: ignore[arg-type]


def unpair(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`pair`; harmless where there is nothing to undo."""
    for module in modules:
        twin = module.__dict__.pop(_TWIN, None)
        if twin is not None:
            module.__class__ = type(twin)


def linear_in_halves(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map whose first half of rows meets the first matrix.

    Args:
        x: ``[2 B, ..., in]``.
        matrices: ``[2, out, in]``.
        bias: ``[2, out]``, or ``[out]`` for both.

    Returns:
        ``[2 B, ..., out]``.
    """
    # In two steps: as one reshape the compiler does not see that it is the same memory, and copies.
    halves = x.unflatten(0, (2, x.shape[0] // 2)).flatten(1, -2)
    out = torch.bmm(halves, matrices.mT)
    if bias is not None:
        out = out + (bias[:, None] if bias.dim() == 2 else bias)
    return out.view(*x.shape[:-1], matrices.shape[1])


def linear_half_by_half(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear_in_halves` as two products that add their bias on the way: for matrices so large that launches do not matter."""
    if bias is None:
        return linear_in_halves(x, matrices, bias)
    halves = x.unflatten(0, (2, x.shape[0] // 2)).flatten(1, -2)
    out = x.new_empty(*halves.shape[:-1], matrices.shape[1])
    for half, matrix, own, place in zip(halves, matrices, bias.expand(2, -1), out, strict=True):
        torch.addmm(own, half, matrix.T, out=place)
    return out.view(*x.shape[:-1], matrices.shape[1])


@cache
def _paired(kind: Any) -> type[nn.Module]:
    """The class of modules of a kind that compute in halves."""
    plain = kind.forward in (nn.Linear.forward, LinearMap.forward)  # spelled out: compilers fail on its vmap for sizes that vary

    def forward(self: nn.Module, *inputs: Tensor) -> Any:
        twin = self.__dict__[_TWIN]
        if plain:
            return linear_in_halves(inputs[0], self.weight, self.bias)  # type: ignore[arg-type]
        weights: dict[str, Tensor] = {name: value for name, value in self._parameters.items() if value is not None}

        def half(weights: dict[str, Tensor], *inputs: Tensor) -> Any:
            return functional_call(twin, weights, inputs)

        outputs = torch.vmap(half)(weights, *(x.unflatten(0, (2, x.shape[0] // 2)) for x in inputs))
        return outputs.flatten(0, 1)

    return type(f"Paired{kind.__name__}", (kind,), {"forward": forward})

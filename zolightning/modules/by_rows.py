"""A large matrix that is perturbed, multiplied and differentiated a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning.modules.gradient import Gradient, LinearGradient, LookupGradient, Scaling
from zolightning.modules.shift import Shift

_NAMES = {F.linear: ("input", "weight", "bias"), F.embedding: ("input", "weight", "padding_idx")}


@dataclass(frozen=True)
class Matrix:
    """Where the rows come from, and where their gradient goes.

    Args:
        index: Number of the block.
        weight: The matrix itself.
        shift: The point at which it is wanted; without it: as it is.
        scaling: How the pieces of its gradient come; ``step`` is a multiple of its width.
        keep: Takes the gradient of one use, to be read when those of all uses are there.
    """

    index: int
    weight: Tensor
    shift: Shift | None
    scaling: Scaling
    keep: Callable[[int, Gradient], None]

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, some at a time."""
        count, rows = self.weight.shape[0], self.scaling.step // self.weight.shape[1]
        if self.shift is None:
            yield slice(0, count), self.weight.detach()
            return
        for first in range(0, count, rows):
            last = min(first + rows, count)
            yield slice(first, last), self.shift.rows(self.index, first, last)


class RowWeight(Tensor):
    """Stands for a :class:`Matrix` in the module that owns it. Linear maps and lookups go by rows; anything else is refused."""

    matrix: Matrix

    @classmethod
    def of(cls, matrix: Matrix) -> RowWeight:
        """Make one."""
        weight: RowWeight = Tensor._make_subclass(cls, matrix.weight.detach())
        weight.matrix = matrix
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            of_call = dict(zip(_NAMES.get(func, ()), args, strict=False)) | kwargs
            if isinstance(weight := of_call.get("weight"), cls):
                if func is F.linear:
                    out: Tensor = _Linear.apply(of_call["input"], weight.matrix.weight, weight.matrix)
                    return out if (bias := of_call.get("bias")) is None else out + bias
                if func is F.embedding:
                    return _Lookup.apply(of_call["input"], weight.matrix.weight, weight.matrix, of_call.get("padding_idx"))
            if getattr(func, "__name__", "") == "__get__":  # its shape, type and place
                return func(*args, **kwargs)
        raise NotImplementedError(f"{getattr(func, '__name__', func)} of a large matrix: only linear maps and lookups go by rows")


class _Linear(torch.autograd.Function):
    """``x W^T``; keeps ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(x)
        return torch.cat([F.linear(x, part) for _, part in matrix.parts()], dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,), matrix = ctx.saved_tensors, ctx.matrix
        back = None
        if ctx.needs_input_grad[0]:
            back = torch.zeros_like(x)
            for rows, part in matrix.parts():
                back += gradient[..., rows] @ part
        matrix.keep(matrix.index, LinearGradient(x.flatten(0, -2), gradient.flatten(0, -2), matrix.scaling))
        return back, None, None


class _Lookup(torch.autograd.Function):
    """Rows of ``W``; keeps their numbers alone."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, matrix: Matrix, padding: int | None) -> Tensor:
        ctx.matrix, ctx.padding = matrix, padding
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight) if matrix.shift is None else matrix.shift.take(matrix.index, ids)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (ids,), matrix = ctx.saved_tensors, ctx.matrix
        flat = without_padding(ids, gradient, ctx.padding).reshape(-1, gradient.shape[-1])
        matrix.keep(matrix.index, LookupGradient(ids.flatten(), flat, matrix.weight.shape[0], matrix.scaling))
        return None, None, None, None


def without_padding(ids: Tensor, gradient: Tensor, padding: int | None) -> Tensor:
    """The gradient of what was looked up; as in torch, an embedding's padding token has none."""
    return gradient if padding is None else gradient.masked_fill((ids == padding).unsqueeze(-1), 0)

"""A weight that is perturbed only where it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning.spaces.paired import linear_in_halves


class LazyWeight(Tensor):
    r"""Stands for the matrix :math:`W \pm a z` of an embedding or a linear map without holding it.

    An embedding makes the rows that are looked up; a linear map makes the whole matrix for the time of one product. With two
    copies the first half of the input (along its first dimension) meets :math:`W + a z`, the second :math:`W - a z`.
    """

    copies: int
    _make: Callable[[Tensor | None], Tensor]

    _HARMLESS: ClassVar[frozenset[str]] = frozenset({"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "is_leaf"})

    @staticmethod
    def of(weight: Tensor, copies: int, make: Callable[[Tensor | None], Tensor]) -> LazyWeight:
        """Make one.

        Args:
            weight: The matrix ``W``, for its shape and type.
            copies: 1, or 2 for both signs.
            make: Gives the rows of the perturbed matrix with some ids, ``[*ids.shape, H]`` (see :func:`zolightning.kernels.rows`);
                without ids the whole, ``[copies, *W.shape]``.
        """
        lazy: LazyWeight = Tensor._make_subclass(LazyWeight, weight.detach())
        lazy.copies, lazy._make = copies, make
        return lazy

    def whole(self) -> Tensor:
        """The perturbed matrix; there is none for both signs at once.

        Raises:
            NotImplementedError: It stands for two copies.
        """
        if self.copies != 1:
            raise NotImplementedError("both signs at once are known for embeddings and linear maps alone")
        return self._make(None)[0]

    @classmethod
    def __torch_function__(cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") == "__get__" and getattr(func, "__self__", None) in _GETTERS:
                return func(*args, **kwargs)
            if func is F.embedding and isinstance(args[1], cls) and not isinstance(args[0], cls):
                return args[1]._make(args[0])
            if func is F.linear and isinstance(args[1], cls) and not isinstance(args[0], cls):
                return _linear(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
            plain = [part.whole() if isinstance(part, cls) else part for part in args]
            return func(*plain, **{name: part.whole() if isinstance(part, cls) else part for name, part in kwargs.items()})


_GETTERS = tuple(getattr(Tensor, name) for name in LazyWeight._HARMLESS)


def _linear(weight: LazyWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    matrices = weight._make(None)
    return F.linear(x, matrices[0], bias) if weight.copies == 1 else linear_in_halves(x, matrices, bias)

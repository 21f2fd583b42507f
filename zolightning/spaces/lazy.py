"""A weight that is perturbed only where it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


class Source(Protocol):
    """What computes with a perturbed matrix, ``[N, H]``. The first half of what two copies get meets ``W + a z``, the other minus."""

    copies: int
    #: Context in which it reads the weights.
    reading: Callable[[], AbstractContextManager[Any]]

    def rows(self, ids: Tensor) -> Tensor:
        """Rows with some ids, ``[*ids.shape, H]``."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The linear map of ``x`` (``[..., H]``): ``[..., N]``; ``bias`` is ``[N]``, or ``[copies, N]``."""

    def whole(self) -> Tensor:
        """The matrix of the first copy."""


class LazyWeight(Tensor):
    r"""Stands for the matrix :math:`W \pm a z` of an embedding or a linear map without holding it.

    An embedding makes the rows that are looked up; a linear map is computed by the source as it can. With two copies the first half
    of the input (along its first dimension) meets :math:`W + a z`, the second :math:`W - a z`.
    """

    source: Source

    _HARMLESS: ClassVar[frozenset[str]] = frozenset({"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "is_leaf"})

    @staticmethod
    def of(weight: Tensor, source: Source) -> LazyWeight:
        """Make one.

        Args:
            weight: The matrix ``W``, for its shape and type.
            source: Computes with the perturbed one.
        """
        lazy: LazyWeight = Tensor._make_subclass(LazyWeight, weight.detach())
        lazy.source = source
        return lazy

    def whole(self) -> Tensor:
        """The perturbed matrix; there is none for both signs at once.

        Raises:
            NotImplementedError: It stands for two copies.
        """
        if self.source.copies != 1:
            raise NotImplementedError("both signs at once are known for embeddings and linear maps alone")
        return self.source.whole()

    @classmethod
    def __torch_function__(cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") == "__get__" and getattr(func, "__self__", None) in _GETTERS:
                return func(*args, **kwargs)
            if func in (F.embedding, F.linear):
                given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
                if isinstance(given["weight"], cls) and not isinstance(given["input"], cls):
                    source = given["weight"].source
                    return source.rows(given["input"]) if func is F.embedding else source.linear(given["input"], given.get("bias"))
            plain, named = tree_map_only(cls, cls.whole, (args, kwargs))
            return func(*plain, **named)


_GETTERS = tuple(getattr(Tensor, name) for name in LazyWeight._HARMLESS)

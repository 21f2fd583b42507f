"""Put the tensors of a differentiable forward in the place of the weights, module by module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from zolightning.modules.by_rows import Matrix, RowWeight
from zolightning.modules.gradient import Gradient, Scaling
from zolightning.modules.shift import Shift, owned_blocks
from zolightning.spaces import Space


class _Perturb(torch.autograd.Function):
    """``W + a z`` whose gradient with respect to ``W`` is that of the identity."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shift: Shift, index: int) -> Tensor:
        return shift.block(index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


@dataclass(frozen=True)
class _Recipe:
    """What autograd keeps in place of (a view of) a perturbed block."""

    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Swap:
    """Context in which each module's forward sees its blocks shifted, with gradients to the tensors themselves.

    A small block is perturbed for the time of its module's forward. What autograd saves of it is replaced by a recipe, and drawn again in
    the module's backward (in a checkpointed layer autograd saves nothing, and the layer's forward runs again). A large matrix of a linear
    map or embedding is never whole, see :mod:`zolightning.modules.by_rows`; that holds without a shift too, for its gradient.

    Args:
        space: Whose blocks.
        shift: Where to; without it the small blocks are left as they are.
        large: Elements from which a matrix goes by rows.
        scaling: How the pieces of a block's gradient come, by index.
        keep: Takes the gradients of large matrices.
    """

    def __init__(
        self, space: Space, shift: Shift | None, large: int, scaling: Callable[[int], Scaling], keep: Callable[[int, Gradient], None]
    ) -> None:
        self.space, self.shift = space, shift
        indices = {id(block.tensor): index for index, block in enumerate(space.blocks)}
        self._matrices: dict[int, Matrix] = {}
        self._hosts: list[tuple[nn.Module, dict[str, int]]] = []
        for module in space.model.modules():
            owned = dict(owned_blocks(module, indices))
            for leaf, index in owned.items():
                tensor = space.blocks[index].tensor
                if leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding) and tensor.numel() >= large:
                    self._matrices[index] = Matrix(index, tensor, shift, scaling(index), keep)
            owned = {leaf: index for leaf, index in owned.items() if shift is not None or index in self._matrices}
            if owned:
                self._hosts.append((module, owned))
        self._running: dict[int, tuple[int, Tensor]] = {}  # address -> the perturbed block of a module that is running
        self._handles: list[RemovableHandle] = []
        self._saving = saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> None:
        for module, owned in self._hosts:
            self._handles.append(module.register_forward_pre_hook(partial(self._put, owned)))
            self._handles.append(module.register_forward_hook(partial(self._restore, owned), always_call=True))
        self._saving.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._saving.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        for module, owned in self._hosts:
            self._restore(owned, module)

    def _put(self, owned: dict[str, int], module: nn.Module, *arguments: Any) -> None:
        for leaf, index in owned.items():
            if leaf == "weight" and index in self._matrices and isinstance(module, nn.Linear | nn.Embedding):
                module._parameters[leaf] = RowWeight.of(self._matrices[index])  # type: ignore[assignment]
            elif self.shift is not None:
                fresh: Tensor = _Perturb.apply(self.space.blocks[index].tensor, self.shift, index)
                self._running[fresh.untyped_storage().data_ptr()] = index, fresh
                module._parameters[leaf] = fresh  # type: ignore[assignment]

    def _restore(self, owned: dict[str, int], module: nn.Module, *arguments: Any) -> None:
        for leaf, index in owned.items():
            fresh, module._parameters[leaf] = module._parameters[leaf], self.space.blocks[index].tensor  # type: ignore[assignment]
            if fresh is not None and not isinstance(fresh, RowWeight):
                self._running.pop(fresh.untyped_storage().data_ptr(), None)

    def _pack(self, saved: Tensor) -> Tensor | _Recipe:
        running = self._running.get(saved.untyped_storage().data_ptr())
        return saved if running is None else _Recipe(running[0], saved.shape, saved.stride(), int(saved.storage_offset()))

    def _unpack(self, kept: Tensor | _Recipe) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        assert self.shift is not None
        return self.shift.block(kept.index).as_strided(kept.size, kept.stride, kept.offset)

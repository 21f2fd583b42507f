"""A differentiable probe: the model computes with ``theta + a u``, and autograd keeps no copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from zolightning import kernels
from zolightning.samplers.base import Direction
from zolightning.spaces import Space


@dataclass(frozen=True)
class Shift:
    """The point ``theta + distance * u``.

    Args:
        space: Whose blocks.
        direction: The direction ``u``.
        distance: How far along it.
    """

    space: Space
    direction: Direction
    distance: float

    def _amount(self, index: int) -> Tensor:
        block = self.space.blocks[index]
        amount = self.direction.scales[index].to(self.space.compute_dtype) * self.distance
        return amount.to(block.tensor.device, kernels.compute_dtype(block.dtype))

    def block(self, index: int) -> Tensor:
        """A perturbed copy of a block: the very bits that ``space.probe`` computes with."""
        block = self.space.blocks[index]
        return kernels.materialise(block.tensor.detach(), self._amount(index), self.direction.noise(block))

    def rows(self, index: int, part: Tensor, start: int) -> Tensor:
        """A perturbed copy of some rows of a block.

        Args:
            index: Which block.
            part: The rows, unperturbed, ``[rows, in]``.
            start: Flat index of the first element.
        """
        noise, amount, out = self.direction.noise(self.space.blocks[index]), self._amount(index), torch.empty_like(part)
        flat, source, step = out.view(-1), part.reshape(-1), 1 << (22 if part.is_cuda else 16)
        for at in range(0, part.numel(), step):
            own = source[at : at + step].to(amount.dtype)
            flat[at : at + step] = own + noise.draw(start + at, own.numel(), part.device).to(amount.dtype) * amount
        return out


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
    """Context in which each module's forward sees its blocks shifted, with gradients to the unshifted tensors.

    A module's perturbed weights live while its forward runs. What autograd saves of them is replaced by a recipe, and drawn again
    in the module's backward (inside a checkpointed layer autograd saves nothing, and the layer's forward runs again).

    Args:
        space: Whose blocks.
        shift: Where to.
        leave: Indices of blocks that are taken care of elsewhere.
    """

    def __init__(self, space: Space, shift: Shift, leave: Set[int] = frozenset()) -> None:
        self.space, self.shift = space, shift
        indices = {id(block.tensor): index for index, block in enumerate(space.blocks) if index not in leave}
        self._hosts = [(module, owned) for module in space.model.modules() if (owned := dict(owned_blocks(module, indices)))]
        self._running: dict[int, tuple[int, Tensor]] = {}  # address -> the perturbed block of a module that is running
        self._handles: list[RemovableHandle] = []
        self._saving = saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> None:
        for module, owned in self._hosts:
            self._handles.append(module.register_forward_pre_hook(partial(self._perturb, owned)))
            self._handles.append(module.register_forward_hook(partial(self._restore, owned), always_call=True))
        self._saving.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._saving.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        for module, owned in self._hosts:
            self._restore(owned, module)

    def _perturb(self, owned: dict[str, int], module: nn.Module, *arguments: Any) -> None:
        for leaf, index in owned.items():
            fresh: Tensor = _Perturb.apply(self.space.blocks[index].tensor, self.shift, index)
            self._running[fresh.untyped_storage().data_ptr()] = index, fresh
            module._parameters[leaf] = fresh  # type: ignore[assignment]

    def _restore(self, owned: dict[str, int], module: nn.Module, *arguments: Any) -> None:
        for leaf, index in owned.items():
            fresh, module._parameters[leaf] = module._parameters[leaf], self.space.blocks[index].tensor  # type: ignore[assignment]
            assert fresh is not None
            self._running.pop(fresh.untyped_storage().data_ptr(), None)

    def _pack(self, saved: Tensor) -> Tensor | _Recipe:
        running = self._running.get(saved.untyped_storage().data_ptr())
        return saved if running is None else _Recipe(running[0], saved.shape, saved.stride(), int(saved.storage_offset()))

    def _unpack(self, kept: Tensor | _Recipe) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return self.shift.block(kept.index).as_strided(kept.size, kept.stride, kept.offset)


def owned_blocks(module: nn.Module, indices: dict[int, int]) -> Iterator[tuple[str, int]]:
    """The blocks among a module's own parameters: leaf name and index (``indices``: by ``id`` of the tensor)."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None and id(parameter) in indices:
            yield leaf, indices[id(parameter)]

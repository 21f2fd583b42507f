"""What the model computes with during a differentiable forward: its weights, or ``theta + a u``, without a copy of either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from zolightning import kernels
from zolightning.samplers.base import Direction
from zolightning.spaces import Space


@dataclass(frozen=True)
class Shift:
    """The point ``theta + distance * u``: the very bits that ``space.probe(direction, distance)`` computes with.

    Args:
        space: Whose blocks.
        direction: The direction ``u``.
        distance: How far along it.
    """

    space: Space
    direction: Direction
    distance: float

    def block(self, index: int) -> Tensor:
        """A perturbed copy of a block."""
        noise = self.direction.noise(self.space.blocks[index])
        return self.space.packs[index].materialise(self._amounts, [noise], self.direction.clock)[0][0]

    def take(self, index: int, ids: Tensor) -> Tensor:
        """Perturbed rows of a matrix: ``[*ids.shape, width]``."""
        block = self.space.blocks[index]
        noise = self.direction.noise(block)
        return kernels.rows(block.tensor.detach(), ids, self._amounts, index, noise, self.direction.clock, 1)

    def rows(self, index: int, first: int, last: int) -> Tensor:
        """Perturbed rows ``first`` to ``last`` of a matrix."""
        block = self.space.blocks[index]
        part = block.tensor.detach()[first:last]
        if part.is_cuda:
            return self.take(index, torch.arange(first, last, device=part.device))
        amount = self._amounts[index].to(part.device, kernels.compute_dtype(part.dtype))
        noise, out = self.direction.noise(block), torch.empty_like(part)
        flat, source, start = out.view(-1), part.reshape(-1), first * part.shape[1]
        for at in range(0, part.numel(), 1 << 16):
            own = source[at : at + (1 << 16)].to(amount.dtype)
            flat[at : at + (1 << 16)] = own + noise.draw(start + at, own.numel(), part.device).to(amount.dtype) * amount
        return out

    @cached_property
    def _amounts(self) -> Tensor:
        """Factor of each block's noise."""
        return self.direction.scales.to(self.space.compute_dtype) * self.distance


def owned_blocks(module: nn.Module, indices: dict[int, int]) -> Iterator[tuple[str, int]]:
    """The blocks among a module's own parameters: leaf name and index (``indices``: by ``id`` of the tensor)."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None and id(parameter) in indices:
            yield leaf, indices[id(parameter)]

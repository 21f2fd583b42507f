"""Directions of low rank without matrices of full size: what a linear map adds to its output, and what it learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning import kernels
from zolightning.blocks import Block
from zolightning.noise import Key, LowRankNoise, Noise
from zolightning.samplers.base import Direction, Sampler
from zolightning.spaces.interrupts import uninterrupted


class Factors:
    r"""The factors of the blocks that a sampler moves in low rank: :math:`W + B A`.

    The basis :math:`A` is that of the window of steps, :math:`B` holds the moves that are not in the weights yet.

    Args:
        blocks: All blocks of a space.
        noises: Noise of each in some direction of the sampler.
    """

    def __init__(self, blocks: Sequence[Block], noises: Sequence[Noise]) -> None:
        self._blocks = tuple(blocks)
        known = {index: noise for index, noise in enumerate(noises) if isinstance(noise, LowRankNoise)}
        #: Blocks that have factors.
        self.indices = tuple(known)
        self.window = next(iter(known.values())).window
        gains = [known[i].rank ** -0.5 if i in known else 1.0 for i in range(len(blocks))]
        self._gains = torch.tensor(gains, dtype=torch.float32, device=blocks[0].tensor.device)
        self._left, self._basis = {}, {}
        for index, noise in known.items():
            weight = blocks[index].tensor
            compute = kernels.compute_dtype(weight.dtype)
            self._left[index] = torch.zeros(weight.shape[0], noise.rank, dtype=compute, device=weight.device)
            self._basis[index] = torch.zeros(noise.rank, weight.shape[1], dtype=weight.dtype, device=weight.device)
        ids = [block.id for block in blocks]
        own = [ids[index] for index in self.indices]
        self._moved = kernels.Pack([self._left.get(i, block.tensor) for i, block in enumerate(blocks)], ids)
        self._lefts = kernels.Pack([*self._left.values()], own, self.indices)
        self._bases = kernels.Pack([*self._basis.values()], own)
        self._decay = torch.zeros((), dtype=torch.float32, device=self._gains.device)  # that the weights have not seen yet
        self._drawn: tuple[int, int] | None = None  # seed and window of the basis
        self._rest: list[int] = []  # blocks that a fold has not come to yet

    @staticmethod
    def of(sampler: Sampler, blocks: Sequence[Block]) -> Factors | None:
        """The factors of a space's blocks; ``None`` where the sampler moves none of them in low rank."""
        noises = [sampler.noise(block, Key(0, block.id, 0)) for block in blocks]
        return Factors(blocks, noises) if any(isinstance(noise, LowRankNoise) for noise in noises) else None

    @torch.no_grad()
    def follow(self, sampler: Sampler, seed: int, step: int) -> None:
        """Draw the basis of a step's window, where it is another one. To be called before every step.

        Args:
            sampler: The sampler.
            seed: Seed of the run.
            step: The coming step.
        """
        if self._drawn == (seed, step // self.window):
            return
        with uninterrupted():
            self._renew(sampler, seed, step)

    def _renew(self, sampler: Sampler, seed: int, step: int) -> None:
        if self._drawn is not None:
            self.settle(sampler, self._drawn[0], step)
        noises = [sampler.noise(self._blocks[i], Key(seed, self._blocks[i].id, step)) for i in self.indices]
        bases = [noise.basis for noise in noises if isinstance(noise, LowRankNoise)]
        torch._foreach_zero_(list(self._basis.values()))
        ones = torch.ones(len(bases), dtype=torch.float32, device=self._gains.device)
        for basis, made in zip(self._basis.values(), self._bases.materialise(ones, bases), strict=True):
            basis.copy_(made[0])
        self._drawn = seed, step // self.window

    def paths(self, direction: Direction, amounts: Tensor, copies: int) -> dict[int, SidePath]:
        r"""What computes with :math:`W + (B \pm a b) A` for the blocks that have factors.

        Args:
            direction: The direction.
            amounts: Factor of each block's noise, ``[blocks]``.
            copies: 1, or 2 for both signs.
        """
        noises = self._noises(direction)
        lefts = self._lefts.materialise(amounts * self._gains, [noises[i] for i in self.indices], direction.clock, copies)
        return {
            index: SidePath(self._blocks[index].tensor, left, self._basis[index]) for index, left in zip(self.indices, lefts, strict=True)
        }

    def fusable(self, directions: Sequence[Direction]) -> bool:
        """See :meth:`zolightning.kernels.Pack.fusable`."""
        return self._moved.fusable([self._noises(direction) for direction in directions])

    def move(self, directions: Sequence[Direction], amounts: Tensor, shrink: Tensor | float, valid: Tensor, deferred: bool) -> None:
        """See :meth:`zolightning.spaces.Space.move`; ``amounts`` is ``[queries, blocks]``. Deferred: into ``B`` alone."""
        noises = [self._noises(direction) for direction in directions]
        self._moved.update(amounts * self._gains, noises, shrink, valid, directions[0].clock)
        self._decay.add_(torch.where(valid, kernels.scalar(shrink, valid.device, torch.float32), 0.0))
        if not deferred:
            self._fold(noises[0], directions[0].clock)

    @torch.no_grad()
    def settle(self, sampler: Sampler, seed: int, step: int) -> None:
        """Bring deferred moves into the weights.

        Args:
            sampler: The sampler.
            seed: Seed of the run.
            step: The coming step.
        """
        self._fold([_moved(sampler.noise(block, Key(seed, block.id, max(step - 1, 0)))) for block in self._blocks], None)

    def _fold(self, noises: Sequence[Noise], clock: Tensor | None) -> None:
        self._rest = self._rest or list(self.indices)  # what an error left out, if it came half way
        while self._rest:
            index = self._rest[-1]
            kernels.fold(self._blocks[index].tensor, self._left[index], self._basis[index], self._decay, noises[index], clock)
            self._left[index].zero_()
            self._rest.pop()
        self._decay.zero_()

    def drop(self) -> None:
        """Forget deferred moves."""
        torch._foreach_zero_([self._decay, *self._left.values()])
        self._rest = []

    def _noises(self, direction: Direction) -> list[Noise]:
        """The noise of each block's moved tensor: ``B``, or the block itself."""
        return [_moved(direction.noise(block)) for block in self._blocks]


def _moved(noise: Noise) -> Noise:
    return noise.left if isinstance(noise, LowRankNoise) else noise


class SidePath:
    r"""Computes with :math:`W + B A` without making it; see :class:`zolightning.spaces.lazy.Source`.

    Args:
        weight: ``W``: ``[N, H]``.
        left: ``B`` of each copy: ``[copies, N, R]``.
        basis: ``A``: ``[R, H]``.
    """

    reading: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, weight: Tensor, left: Tensor, basis: Tensor) -> None:
        self.copies = left.shape[0]
        self._weight, self._left, self._basis = weight, left, basis

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        with self.reading():
            out = F.linear(x, self._weight)
        # [copies, rows of a copy, features]: a leading dimension of 2 B cut in halves, or all as they are
        moved, inner = (y.view(self.copies, -1, y.shape[-1]) for y in (out, F.linear(x, self._basis)))
        moved.baddbmm_(inner, self._left.to(x.dtype).mT)  # in place: another result would be filled with a copy first
        if bias is not None:
            moved += bias[:, None] if bias.dim() == 2 else bias
        return out

    def rows(self, ids: Tensor) -> Tensor:
        wide = self._left.dtype
        parts = [left[part] for left, part in zip(self._left, ids.chunk(self.copies), strict=True)]
        with self.reading():
            base = self._weight[ids]
        return (base.to(wide) + torch.cat(parts) @ self._basis.to(wide)).to(base.dtype)

    def whole(self) -> Tensor:
        wide = self._left.dtype
        with self.reading():
            return (self._weight.to(wide) + self._left[0] @ self._basis.to(wide)).to(self._weight.dtype)

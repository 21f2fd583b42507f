"""A move that waits for the next step's probes, which read the weights anyway."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zolightning.blocks import Block
from zolightning.kernels import Pack, Update, scalar
from zolightning.noise import Key
from zolightning.samplers.base import Direction, Sampler
from zolightning.spaces.interrupts import uninterrupted


class LateMove:
    """The move of a step, made by the forwards of the next one: each block's at its first read.

    A read that makes the whole perturbed block moves it in the same pass; before any other read (single rows, a block that is made
    together with one that has moved already) it is moved by a pass of its own, and so is, before the next move takes its place, what no
    forward has read. So between two steps all blocks wait, whatever a forward reads, and the weights have the bits of moves made at once.

    What waits is a few numbers a block, in tensors that stay, for CUDA graphs to read and write. The walk over the blocks is Python's and
    part of a capture, so only captured steps may defer: where one of them fails, nothing of it has run.

    Args:
        blocks: All blocks of a space.
        dtype: Type of the amounts.
    """

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype) -> None:
        self._blocks, device = tuple(blocks), blocks[0].tensor.device
        self._amounts = torch.zeros(1, len(blocks), dtype=dtype, device=device)
        self._shrink = torch.zeros((), dtype=dtype, device=device)
        self._valid = torch.zeros((), dtype=torch.bool, device=device)
        self._clock = torch.zeros((), dtype=torch.int64, device=device)
        self._source: tuple[Sampler, int] | None = None  # sampler and seed of the move
        self._move = Update(self._amounts, (), self._shrink, self._valid, self._clock)
        self._rest = set(range(len(blocks)))  # blocks that the walk over a step has not come to yet
        self._packs: dict[tuple[int, ...], Pack] = {}
        #: Whether a move may wait; on the device it is ``valid`` that says so.
        self.waits = False

    def begin(self, sampler: Sampler, seed: int, step: int) -> None:
        """Get ready for the walk over a step.

        Args:
            sampler: Gives the step's direction.
            seed: Seed of the run.
            step: The step.
        """
        if self._source is None or self._source[0] is not sampler or self._source[1] != seed:
            self.catch_up()  # the older one's noise is another
            self._name(sampler, seed, step)
        self._start()

    def take(self, indices: Sequence[int]) -> Update | None:
        """Called before some blocks are made in full.

        Args:
            indices: Numbers of the blocks.

        Returns:
            The move that has to be made with them; ``None``: they have moved.
        """
        if self._rest.issuperset(indices):
            self._rest.difference_update(indices)
            return self._move
        self.make(indices)
        return None

    def make(self, indices: Iterable[int]) -> None:
        """Move those of some blocks that have not moved yet; called before they are read in another way."""
        waiting = tuple(sorted(self._rest.intersection(indices)))
        self._rest.difference_update(waiting)
        if waiting:
            if waiting not in self._packs:
                own = [self._blocks[index] for index in waiting]
                self._packs[waiting] = Pack([block.tensor for block in own], [block.id for block in own], waiting)
            self._packs[waiting].make(self._move)

    def note(self, direction: Direction, amounts: Tensor, shrink: Tensor | float, valid: Tensor) -> None:
        """Let the move of a step wait; see :meth:`zolightning.spaces.Space.move`.

        Args:
            direction: The step's direction.
            amounts: ``[1, blocks]``.
            shrink: Rate of weight decay.
            valid: 0-d bool.
        """
        self.make(range(len(self._blocks)))
        self._amounts.copy_(amounts)
        self._shrink.copy_(scalar(shrink, self._shrink.device, self._shrink.dtype))
        self._valid.copy_(valid)
        self._clock.copy_(direction.clock) if direction.clock is not None else self._clock.fill_(direction.step)
        self._name(direction.sampler, direction.seed, direction.step)
        self._start()

    @torch.no_grad()
    def catch_up(self) -> None:
        """Make the move that waits, if one does."""
        if self.waits:
            with uninterrupted():
                if self._source is not None and self._blocks[0].tensor.device != self._clock.device:
                    self._name(*self._source, int(self._clock))  # plain forms of noise know their step, not the clock
                self._start()
                self.make(range(len(self._blocks)))
                self.drop()

    def moved(self) -> None:
        """Make the move where the blocks are now; they were elsewhere before."""
        self._packs.clear()
        self.catch_up()

    def drop(self) -> None:
        """Forget the move that waits."""
        self._valid.zero_()
        self._start()
        self.waits = False

    def _start(self) -> None:
        self._rest = set(range(len(self._blocks)))

    def _name(self, sampler: Sampler, seed: int, step: int) -> None:
        self._source = sampler, seed
        noises = [sampler.noise(block, Key(seed, block.id, step)) for block in self._blocks]
        self._move = Update(self._amounts, noises, self._shrink, self._valid, self._clock)

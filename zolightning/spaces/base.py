"""What a space is: the blocks that move, and how a probe sees them. Perturbation happens here and nowhere else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from zolightning import kernels
from zolightning.blocks import Block
from zolightning.samplers.base import Direction, Sampler
from zolightning.spaces.factors import Factors
from zolightning.spaces.interrupts import uninterrupted


@dataclass
class SetupReport:
    """What the set-up probe found.

    Args:
        loss: Loss of the set-up probe.
        resolved: Share of all elements that differ from the weights after rounding ``W + eps u``.
        unresolved: Blocks in which fewer than half of the elements differ.
        unread: Blocks that the probe's forward never read.
        lifted: Blocks whose swap happens in the parent module, because the parent reads them.
    """

    loss: float = float("nan")
    resolved: float = 1.0
    unresolved: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    lifted: list[str] = field(default_factory=list)


class Space(ABC):
    """The blocks that move.

    Args:
        model: The network; its weights are read-only except inside :meth:`move`.
        blocks: What moves.

    Raises:
        ValueError: There is no block, a block is not contiguous, or two blocks share an id.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        for block in self.blocks:
            if not block.tensor.is_contiguous():
                raise ValueError(f"block {block.name!r} is not contiguous in memory; call .contiguous() on it first")
        self._places = [block.tensor.data_ptr() for block in self.blocks]
        #: Keep the moves of low rank beside the weights, until :meth:`settle` or the end of their window; weight decay waits with them.
        #: Others wait for the next step's probes where a step is taken in :meth:`walk`.
        self.deferred = False
        #: Whether the forward of :attr:`layers` is a compiled one at present.
        self.compiled = False
        self._sampler: Sampler | None = None  # whose factors these are
        self._factors: Factors | None = None

    def prepare(self, sampler: Sampler, seed: int, step: int) -> None:
        """Called before every step; the place for what a captured step cannot do.

        Args:
            sampler: Gives the step's directions.
            seed: Seed of the run.
            step: The coming step.
        """
        if sampler is not self._sampler:
            self.settle(seed, step)
            self._sampler, self._factors = sampler, Factors.of(sampler, self.blocks)
        if self._factors is not None:
            self._factors.follow(sampler, seed, step)

    def settle(self, seed: int, step: int) -> None:
        """Bring deferred moves into the weights; nothing to do where there are none.

        Args:
            seed: Seed of the run.
            step: The coming step.
        """
        self.catch_up()
        if self._factors is not None and self._sampler is not None and self.deferred:
            with uninterrupted():
                self._factors.settle(self._sampler, seed, step)

    def walk(self, sampler: Sampler, seed: int, step: int) -> AbstractContextManager[None]:
        """Context of a captured step of one direction: its move may wait for the probes of the next one; see :meth:`catch_up`.

        Args:
            sampler: Gives the step's direction.
            seed: Seed of the run.
            step: The step.
        """
        return nullcontext()

    def catch_up(self) -> None:  # noqa: B027
        """Make the move that waits for the next step's probes; the weights then have the bits of a move made at once."""

    def drop(self) -> None:
        """Forget deferred moves: the weights are about to be others."""
        if self._factors is not None:
            self._factors.drop()

    @property
    def held(self) -> tuple[Factors, ...]:
        """What a captured step reads and writes beside the weights; nothing where no block moves in low rank."""
        return () if self._factors is None else (self._factors,)

    def factors(self, direction: Direction) -> Factors | None:
        """What moves in low rank along a direction; ``None``: nothing does."""
        self.prepare(direction.sampler, direction.seed, direction.step)
        return self._factors

    def fusable(self, directions: Sequence[Direction]) -> bool:
        """Whether the fused kernels know everything that a step does with the blocks; see :meth:`zolightning.kernels.Pack.fusable`."""
        factors = self.factors(directions[0])
        if factors is not None:
            return factors.fusable(directions)
        return self.pack.fusable([[direction.noise(block) for block in self.blocks] for direction in directions])

    @cached_property
    def pack(self) -> kernels.Pack:
        """All blocks, for one pass over them."""
        return kernels.Pack([block.tensor for block in self.blocks], [block.id for block in self.blocks])

    @cached_property
    def packs(self) -> list[kernels.Pack]:
        """Each block by itself; its amount has the block's place among all."""
        return [kernels.Pack([block.tensor], [block.id], [index]) for index, block in enumerate(self.blocks)]

    def locate(self) -> None:
        """Take the blocks where they are now: between two runs a model may have been on another device. A new optimizer calls it."""
        places = [block.tensor.data_ptr() for block in self.blocks]
        if places != self._places:
            self._places = places
            self._moved()

    def _moved(self) -> None:
        """Forget the addresses of all blocks."""
        self.__dict__.pop("pack", None)
        self.__dict__.pop("packs", None)
        self._sampler = self._factors = None

    @property
    def numel(self) -> int:
        """Number of elements that move."""
        return sum(block.numel for block in self.blocks)

    @property
    def device(self) -> torch.device:
        """Device of the first block; coefficients and scales live there."""
        return self.blocks[0].tensor.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of coefficients and losses: float64 where the blocks are float64, else float32."""
        return torch.float64 if any(block.dtype == torch.float64 for block in self.blocks) else torch.float32

    @abstractmethod
    def probe(self, direction: Direction, distance: float, hold: bool = False) -> AbstractContextManager[None]:
        """Context in which the model computes with ``theta + distance * u``; the weights themselves are not written.

        Args:
            direction: The direction ``u``.
            distance: Signed probe distance, ``+eps`` or ``-eps``.
            hold: Keep the perturbed weights for the whole probe, for losses of several forwards (generation): twice the
                memory of the weights, and the noise is drawn once.
        """

    @property
    def pairable(self) -> bool:
        """Whether :meth:`pair` may be tried; whether it is right for the model, a comparison at set-up decides."""
        return False

    def pair(self, direction: Direction, distance: float) -> AbstractContextManager[None]:
        """Context in which the model computes the first half of its rows with ``theta + distance * u``, the second with minus.

        Args:
            direction: The direction ``u``.
            distance: Probe distance.
        """
        raise NotImplementedError

    @property
    def layers(self) -> list[nn.Module]:
        """Repeated layers whose forward may be compiled: a probe swaps weights around it, not inside. None by default."""
        return []

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint has to agree on beside the blocks, since it decides what the same blocks mean. Nothing by default."""
        return {}

    def active(self, clock: Tensor) -> Tensor | None:
        """Which blocks move in a step, for spaces whose blocks take turns; ``None``: all of them, in every step.

        It depends on the step alone, by device operations alone: a resumed run, a replica and a captured step find the same.

        Args:
            clock: Number of the step: 0-d int64, on :attr:`device`.

        Returns:
            1 for a block that moves, else 0: float32, shape ``[blocks]``.
        """
        return None

    def scratch(self, copies: int, hold: bool) -> int:
        """Bytes that a probe takes beside the weights.

        Args:
            copies: 1, or 2 for both signs in one forward.
            hold: As for :meth:`probe`.
        """
        sizes = [block.numel * block.tensor.element_size() for block in self.blocks]
        return copies * (sum(sizes) if hold else max(sizes))

    @abstractmethod
    def verify(self, evaluate: Callable[[], Tensor], direction: Direction, eps: float, hold: bool = False) -> SetupReport:
        """Run one probe at set-up and prove that it is what it claims to be.

        Args:
            evaluate: Computes the loss.
            direction: A direction to probe along.
            eps: Probe distance.
            hold: As for :meth:`probe`.

        Raises:
            ValueError: The probe reads unperturbed weights, writes a weight or buffer, is not finite, or ``eps`` is too small.
        """

    def move(self, directions: Sequence[Direction], weights: Tensor, shrink: Tensor | float, valid: Tensor) -> None:
        r"""In-place step :math:`\theta_i \leftarrow \theta_i - r\,\theta_i + \sum_q w_q \sigma_{q,i} z_{q,i}`.

        Args:
            directions: ``Q`` directions of one step, with consecutive queries.
            weights: The factors ``w_q``: shape ``[Q]``, :attr:`compute_dtype`.
            shrink: The rate ``r`` of weight decay; 0 for none.
            valid: 0-d bool tensor; false leaves all weights as they are.
        """
        amounts = weights[:, None] * torch.stack([d.scales for d in directions])
        if (factors := self.factors(directions[0])) is not None:
            with uninterrupted():
                factors.move(directions, amounts, shrink, valid, self.deferred)
            return
        noises = [[direction.noise(block) for block in self.blocks] for direction in directions]
        with uninterrupted():
            self.pack.update(amounts, noises, shrink, valid, directions[0].clock)

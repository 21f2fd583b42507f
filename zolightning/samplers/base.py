"""What a sampler is: the distribution of the direction ``u``, whose block ``i`` is ``scales[i] * z_i``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zolightning.blocks import Block
from zolightning.noise import Key, Noise


class HasBlocks(Protocol):
    """What :meth:`Sampler.bind` needs of a space."""

    @property
    def blocks(self) -> Sequence[Block]: ...


@dataclass(frozen=True, eq=False)
class Direction:
    """One direction ``u`` of one step, named by its keys and scales; no noise is stored.

    Args:
        sampler: Gives each block its noise.
        seed: Run seed.
        step: Optimizer step.
        query: Number of the direction within the step.
        scales: Standard deviation per block: float32, shape ``[blocks]``.
    """

    sampler: Sampler
    seed: int
    step: int
    query: int
    scales: Tensor

    def key(self, block: Block) -> Key:
        """Key of the block's streams in this direction."""
        return Key(self.seed, block.id, self.step, self.query)

    def noise(self, block: Block) -> Noise:
        """The block's ``z``."""
        return self.sampler.noise(block, self.key(block))


class Sampler(ABC):
    """Distribution of the directions. A subclass names the noise of a block; scales default to one everywhere.

    A sampler holds no blocks until :meth:`bind`.

    Example:
        >>> class HalfSampler(Sampler):  # perturbs every second element
        ...     second_moment = 0.5
        ...     def noise(self, block, key):
        ...         return MyNoise(key)  # a Noise subclass with a draw() of its own
    """

    #: The constant ``m`` of ``E[z z^T] = m I``; the estimator's mean is then ``m * scales**2 * gradient``.
    second_moment: float = 1.0

    def bind(self, space: HasBlocks) -> None:
        """Attach the sampler to the blocks of a space (called by ``ZOOptimizer``)."""
        self.blocks = tuple(space.blocks)

    @abstractmethod
    def noise(self, block: Block, key: Key) -> Noise:
        """Noise ``z`` of one block, a pure function of ``key``."""

    def scales(self) -> Tensor:
        """Standard deviation of each block in the coming step: float32, shape ``[blocks]``, on the blocks' device."""
        return torch.ones(len(self.blocks), dtype=torch.float32, device=self.blocks[0].tensor.device)

    def observe(self, losses: Tensor) -> None:  # noqa: B027
        """Learn from the probe losses of a step; tensors are written in place, with device operations only.

        Args:
            losses: Shape ``[probes]``, in the order of the estimator's probes. If one is not finite, the state must stay as it is.
        """

    def refresh(self, step: int) -> None:  # noqa: B027
        """Get ready for a step; called on the host before each one, never inside a CUDA graph."""

    def state(self) -> dict[str, Tensor]:
        """The live tensors that a resumed run needs back, by name; restored in place."""
        return {}

    def directions(self, seed: int, step: int, queries: int) -> tuple[Direction, ...]:
        """The directions of one step; they share their scales."""
        scales = self.scales()
        return tuple(Direction(self, seed, step, query, scales) for query in range(queries))

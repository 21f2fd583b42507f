"""What a sampler is: the distribution of the direction ``u``, whose block ``i`` is ``scales[i] * z_i``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
        clock: The step once more, as the GPU kernels read it: 0-d int64 on the blocks' device. In a captured CUDA graph it is the
            one that counts; without it the kernels take ``step``.
    """

    sampler: Sampler
    seed: int
    step: int
    query: int
    scales: Tensor
    clock: Tensor | None = None

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
    #: Whether a CUDA graph may replay :meth:`scales` and :meth:`observe`: they depend on tensors alone, and do not look at values.
    capturable: bool = False
    #: Whether :meth:`scales` is the same in every step of a run; a journal then holds them once.
    constant_scales: bool = False

    def bind(self, space: HasBlocks) -> None:
        """Attach the sampler to the blocks of a space (called by ``ZOOptimizer``)."""
        self.blocks = tuple(space.blocks)

    @abstractmethod
    def noise(self, block: Block, key: Key) -> Noise:
        """Noise ``z`` of one block, a pure function of ``key``."""

    def scales(self) -> Tensor:
        """Standard deviation of each block in the coming step: float32, shape ``[blocks]``, on the blocks' device."""
        return torch.ones(len(self.blocks), dtype=torch.float32, device=self.blocks[0].tensor.device)

    def restrict(self, scales: Tensor, active: Tensor) -> Tensor:
        """Scales of a step in which only some blocks move.

        Args:
            scales: Those of all blocks: shape ``[blocks]``.
            active: 1 for a block that moves, else 0: float32, shape ``[blocks]``; see :meth:`Space.active`.
        """
        return scales * active

    def directions(self, seed: int, step: int, queries: int, clock: Tensor | None = None) -> tuple[Direction, ...]:
        """The directions of one step; they share their scales."""
        scales = self.scales()
        return tuple(Direction(self, seed, step, query, scales, clock) for query in range(queries))

    def refresh(self, step: int) -> None:  # noqa: B027
        """Called before every step; the place for what may look at the host, such as statistics of the weights now and then."""

    def reads_weights(self, step: int) -> bool:
        """Whether :meth:`refresh` looks at the weights before a step; the moves of earlier steps are then made first.

        Args:
            step: The coming step.
        """
        return type(self).refresh is not Sampler.refresh

    def observe(self, losses: Tensor) -> None:  # noqa: B027
        """Called after the probes of every step, with their losses in the order of the estimator's probes.

        On a GPU it runs beside the update of the weights, so it must not look at them.
        A sampler that learns from them writes its tensors in place. Like :meth:`scales` this may be captured in a CUDA graph: it
        must not wait for the device, and losses that are not finite must leave the tensors as they are.
        """

    def state(self) -> dict[str, Tensor]:
        """The tensors that :meth:`observe` and :meth:`refresh` write; they are part of a checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a checkpoint, in place.

        Raises:
            ValueError: They are those of another kind of sampler.
        """
        own = self.state()
        if state.keys() != own.keys():
            raise ValueError(f"the optimizer state is of another sampler than {type(self).__name__}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

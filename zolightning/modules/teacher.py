"""Who moves the weights while a policy is learnt: the trajectory along which its directions are judged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from zolightning.modules.gradient import DenseGradient, Scaling
from zolightning.modules.gradients import backward
from zolightning.modules.readers import ClippedStep, SquaredNorms, Sum, descend
from zolightning.noise import Key
from zolightning.optim import ZOOptimizer
from zolightning.spaces import Space


class Teacher(ABC):
    r"""Trains the weights over and over: each period starts at the pretrained weights, and its rate falls linearly to zero.

    .. math:: \eta_t = \eta \left(1 - (t \bmod P) / P\right)

    Args:
        lr: Learning rate at the start of a period.
        reset_every: Steps ``P`` of a period.

    Raises:
        ValueError: An argument is out of range.
    """

    #: Loss evaluations of a step.
    forwards: int = 1

    def __init__(self, lr: float, reset_every: int) -> None:
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr={lr} of the teacher must be finite and not negative")
        if reset_every < 1:
            raise ValueError(f"reset_every={reset_every} must be at least 1")
        self.lr, self.reset_every = lr, reset_every

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.lr * (1 - step % self.reset_every / self.reset_every)

    def starts(self, step: int) -> bool:
        """Whether a period starts with that step."""
        return step % self.reset_every == 0

    @abstractmethod
    def step(self, space: Space, loss: Callable[[], Tensor], step: int, seed: int, checkpoint: bool = False) -> Tensor:
        """Move the weights once; returns the loss, detached.

        Args:
            space: What moves.
            loss: Evaluates the loss of the step's batch.
            step: Number of the step, counted over all periods.
            seed: Seed of the rounding.
            checkpoint: Checkpoint the decoder layers.
        """

    def forget(self) -> None:  # noqa: B027
        """A period starts: drop what the last one has left."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs back, besides the weights."""
        return {}

    def load_state(self, space: Space, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Take it back."""


class OneCopySGD(Teacher):
    r"""Plain gradient descent inside the backward: the only weight-sized thing in memory are the weights.

    Each block moves as soon as its gradient has arrived, clipped by itself, see :class:`~zolightning.modules.readers.ClippedStep`.

    Args:
        lr: Learning rate at the start of a period.
        clip: Largest norm of a block's gradient.
        reset_every: Steps of a period.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, lr: float = 1e-2, clip: float = 1.0, reset_every: int = 200) -> None:
        super().__init__(lr, reset_every)
        self.clip = _positive("clip", clip)

    def step(self, space: Space, loss: Callable[[], Tensor], step: int, seed: int, checkpoint: bool = False) -> Tensor:
        return backward(space, loss, ClippedStep(space, self.rate(step), self.clip, seed, step), checkpoint=checkpoint)


class MomentumSGD(Teacher):
    r"""The published teacher: gradient descent with momentum, the whole gradient clipped.

    .. math:: m \leftarrow \mu m + g \min(1, c / \|g\|), \qquad W \leftarrow W - \eta_t m

    Two copies of the weights. The gradient itself is not held: it is added to the momentum as it arrives, and where it turns out to be
    longer than ``c``, a second backward takes the excess off again.

    Args:
        lr: Learning rate at the start of a period.
        momentum: The factor ``mu``.
        clip: Largest norm ``c`` of the gradient.
        reset_every: Steps of a period.
        device: Where the momentum is held, ``cpu`` for models that fill the accelerator; without it: beside the weights.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, lr: float = 1e-2, momentum: float = 0.8, clip: float = 1.0, reset_every: int = 200, device: str | None = None
    ) -> None:
        super().__init__(lr, reset_every)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be at least 0 and below 1")
        self.momentum, self.clip, self.device = momentum, _positive("clip", clip), device
        self._sum: Sum | None = None

    def step(self, space: Space, loss: Callable[[], Tensor], step: int, seed: int, checkpoint: bool = False) -> Tensor:
        total, norms = self._momentum(space), SquaredNorms(space)
        total.scale(self.momentum)
        total.weight = 1.0
        value = backward(space, loss, norms, total, checkpoint=checkpoint)
        norm = math.sqrt(float(norms.values.sum()))
        if not math.isfinite(norm):
            self.forget()
            return value
        if norm > self.clip:
            total.weight = self.clip / norm - 1
            backward(space, loss, total, checkpoint=checkpoint)
        rate = torch.full((), self.rate(step), dtype=space.compute_dtype, device=space.device)
        for block, held in zip(space.blocks, total.held, strict=True):
            descend(block, DenseGradient(held, Scaling(held.dtype)), rate, Key(seed, block.id, step))
        return value

    def _momentum(self, space: Space) -> Sum:
        if self._sum is None:
            self._sum = Sum(space, self.device)
        return self._sum

    def forget(self) -> None:
        if self._sum is not None:
            self._sum.scale(0.0)

    def state(self) -> dict[str, Tensor]:
        return {} if self._sum is None else {str(index): held for index, held in enumerate(self._sum.held)}

    def load_state(self, space: Space, state: dict[str, Tensor]) -> None:
        if state:
            for index, held in enumerate(self._momentum(space).held):
                held.copy_(state[str(index)])


class ZerothOrder(Teacher):
    """A trajectory of forward-only steps with uniform scales: where a run that uses the policy will be.

    Args:
        lr: Learning rate at the start of a period.
        eps: Probe distance.
        reset_every: Steps of a period.
        seed: Seed of its directions; not the run's, whose directions are those that the policy is judged by.

    Raises:
        ValueError: An argument is out of range.
    """

    forwards = 2

    def __init__(self, lr: float = 1e-5, eps: float = 1e-3, reset_every: int = 1000, seed: int = 1) -> None:
        super().__init__(_positive("lr", lr), reset_every)
        self.eps, self.seed = _positive("eps", eps), seed
        self._optimizer: ZOOptimizer | None = None

    def step(self, space: Space, loss: Callable[[], Tensor], step: int, seed: int, checkpoint: bool = False) -> Tensor:
        if self._optimizer is None:
            self._optimizer = ZOOptimizer(space, lr=self.lr, eps=self.eps, seed=self.seed)
        self._optimizer.param_groups[0].update(step=step, lr=self.rate(step))
        return self._optimizer.step(loss)


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value} must be positive and finite")
    return value

"""What makes scales good: the losses on which a policy is trained, each a class with one method."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zolightning.modules.gradients import backward
from zolightning.modules.per_row import RowNorms
from zolightning.modules.readers import InnerProducts
from zolightning.modules.scale_rules import Ratio, ScaleRule
from zolightning.modules.shift import Shift
from zolightning.modules.statistics import BlockStatistics, collect_statistics, expected_decrease
from zolightning.objectives.base import Objective
from zolightning.objectives.batch import Batch
from zolightning.optim.precision import exact_float32
from zolightning.policies import BlockInfo, Policy
from zolightning.samplers.base import Direction, Sampler
from zolightning.spaces import Space


@dataclass(frozen=True)
class MetaPoint:
    """Where the scales of a step are judged.

    Args:
        space: The blocks, at the weights of the step.
        objective: The loss that the task is trained on.
        batch: Rows of the step.
        sampler: Gives the noise; bound to the space.
        seed: Seed of the directions.
        step: Number of the step.
        task: Index of the task that the rows are from.
        checkpoint: Checkpoint the decoder layers.
    """

    space: Space
    objective: Objective
    batch: Batch
    sampler: Sampler
    seed: int = 0
    step: int = 0
    task: int = 0
    checkpoint: bool = False


class Verdict(NamedTuple):
    r"""How good the scales are.

    Args:
        loss: The meta-loss: 0-d.
        gradient: Its derivative with respect to the scales: shape ``[blocks]``.
        losses: Losses of probes along the scales' direction (plus, minus), where there were any: the policy may see them in the next step.
    """

    loss: Tensor
    gradient: Tensor
    losses: Tensor | None = None


class MetaObjective(ABC):
    """Judges scales. Policies are differentiated outside: ``scales.backward(verdict.gradient)``.

    Example:
        >>> class Energy(MetaObjective):  # wants small scales
        ...     def __call__(self, point, scales):
        ...         return Verdict(scales.square().sum() / 2, scales)
    """

    #: Loss evaluations of a step.
    forwards: int = 0

    @abstractmethod
    def __call__(self, point: MetaPoint, scales: Tensor) -> Verdict:
        """The verdict on the scales of one step.

        Args:
            point: Weights, rows and noise.
            scales: As a direction has them, detached: shape ``[blocks]``.
        """

    def state(self) -> dict[str, Any]:
        """What a resumed run needs back: tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take it back."""

    def statistics(self) -> Sequence[BlockStatistics]:
        """What was measured on the way, one for each task; empty where nothing was."""
        return ()


class AfterStep(MetaObjective):
    r"""The published objective: the loss on the same rows after one zeroth-order step with the scales.

    .. math:: c = \frac{\ell(\theta + \epsilon \tilde\sigma z) - \ell(\theta - \epsilon \tilde\sigma z)}{2 \epsilon}, \qquad
              L(\tilde\sigma) = \ell\bigl(\theta - \eta\, c\, \tilde\sigma z\bigr), \qquad
              \frac{\partial L}{\partial \tilde\sigma_i} = -\eta\, c\, \langle z_i, \nabla_i \ell(\theta')\rangle

    with ``c`` held constant. The derivative is one number per block, so no second copy of the weights is made: the noise is drawn again
    while the gradient passes. To first order its mean is :math:`-\eta\, \tilde\sigma_i \|\nabla_i \ell\|^2`: this objective knows
    neither curvature nor noise.

    Args:
        lr: The step size ``eta`` of the judged step.
        eps: Probe distance.

    Raises:
        ValueError: An argument is out of range.

    References:
        "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv 2510.00419.
    """

    forwards = 3

    def __init__(self, lr: float = 1e-6, eps: float = 1e-3) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} of the meta-objective must be positive and finite")
        self.lr, self.eps = lr, eps

    def __call__(self, point: MetaPoint, scales: Tensor) -> Verdict:
        space, loss = point.space, point.objective.on(point.space.model, point.batch)
        direction = Direction(point.sampler, point.seed, point.step, 0, scales)
        losses = []
        with torch.no_grad(), exact_float32():
            for sign in (1, -1):
                with space.probe(direction, sign * self.eps):
                    losses.append(loss())
        coefficient = float(losses[0] - losses[1]) / (2 * self.eps)
        products = InnerProducts(space, direction)
        shift = Shift(space, direction, -self.lr * coefficient)
        after = backward(space, loss, products, shift=shift, checkpoint=point.checkpoint)
        return Verdict(after, -self.lr * coefficient * products.values, torch.stack(losses))


class ExpectedDecrease(MetaObjective):
    r"""How far a step of many directions and batches lowers the loss on average, curvature and noise included.

    With the statistics of :mod:`zolightning.modules.statistics` and :math:`p_i = \eta \tilde\sigma_i^2`,

    .. math:: \Delta_t = \sum_i p_i G_i - \tfrac12 \Bigl(\sum_i p_i M_i\Bigr)\Bigl(\sum_i p_i F_i\Bigr) - \rho \sum_i p_i^2 G_i F_i ,
              \qquad L = -\frac{1}{|\text{tasks}|} \sum_t \log \max_\eta \Delta_t .

    With the best step size for each task, neither the size of a task's loss nor that of the scales matters, so no task counts more than
    another. With ``lr`` the step size is given and each task's decrease is divided by its :math:`\sum_i G_i`.

    Each step measures its own rows (pairs within the batch, no second copy of the weights) and adds them to the running means of
    its task. A mean over a batch says little of ``G``; let some steps pass before the policy moves (``warm_up``).

    Args:
        lr: Step size of the judged step; without it: the best one.
        alignment: How far the curvature lies along the gradient, ``rho``, from 0 to 1.
        memory: Share of the running means that a step of the task leaves; 1: plain means over the whole run.
        warm_up: Steps of a task before its statistics count.
        together: Rows per backward when their own gradients are measured; 1: one by one, the least memory.

    Raises:
        ValueError: An argument is out of range.

    References:
        "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv 2510.00419, whose own objective is the first sum alone.
    """

    forwards = 2  # the batch, and its rows once more

    def __init__(self, lr: float | None = None, alignment: float = 0.1, memory: float = 1.0, warm_up: int = 8, together: int = 8) -> None:
        if lr is not None and not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr={lr} of the meta-objective must be positive and finite")
        if not 0 <= alignment <= 1:
            raise ValueError(f"alignment={alignment} must be between 0 and 1")
        if not 0 < memory <= 1:
            raise ValueError(f"memory={memory} must be above 0 and at most 1")
        if warm_up < 1 or together < 1:
            raise ValueError(f"warm_up={warm_up} and together={together} must be at least 1")
        self.lr, self.alignment, self.memory, self.warm_up, self.together = lr, alignment, memory, warm_up, together
        self._means: dict[tuple[int, int], _RunningMean] = {}  # by task and level of the loss
        self._row_norms: RowNorms | None = None

    def __call__(self, point: MetaPoint, scales: Tensor) -> Verdict:
        if self._row_norms is None:
            self._row_norms = RowNorms(point.space, self.together, point.checkpoint)
        found = collect_statistics(point.space, point.objective, [point.batch], False, point.checkpoint, self._row_norms)
        if found.finite:  # a batch that overflows would stay in the mean for good
            self._means.setdefault((point.task, self._level(found.loss)), _RunningMean()).add(found, self.memory)
        ready = [mean.value() for mean in self._means.values() if mean.steps >= self.warm_up]
        scales = scales.detach().requires_grad_()
        with torch.enable_grad():
            losses = [loss for statistics in ready if (loss := self._loss(scales, statistics)) is not None]
        if not losses:
            return Verdict(scales.new_full((), float("nan")), torch.zeros_like(scales.detach()))
        loss = torch.stack(losses).mean()
        (gradient,) = torch.autograd.grad(loss, scales)
        return Verdict(loss.detach(), gradient)

    def _level(self, loss: float) -> int:
        """With which of the task's statistics a batch of this loss belongs."""
        return 0

    def _loss(self, scales: Tensor, statistics: BlockStatistics) -> Tensor | None:
        """The loss of one task; none while its noise hides the signal."""
        decrease = expected_decrease(scales, statistics, self.lr, self.alignment)
        if self.lr is not None:
            whole = float(statistics.gradient.sum())
            return -decrease / whole if whole > 0 else None
        return -decrease.log() if float(decrease.detach()) > 0 else None

    def statistics(self) -> Sequence[BlockStatistics]:
        return [self._means[place].value() for place in sorted(self._means)]

    def state(self) -> dict[str, Any]:
        return {f"{task}/{level}": mean.state() for (task, level), mean in self._means.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        places = {name: tuple(map(int, name.split("/"))) for name in state}
        self._means = {(task, level): _RunningMean(**state[name]) for name, (task, level) in places.items()}


@dataclass
class _RunningMean:
    """Mean of the statistics of a task so far, each step weighing ``1 / memory`` times the one before it."""

    steps: int = 0
    weight: float = 0.0
    rows: int = 0
    batch_size: int = 0
    loss: float = 0.0
    names: list[str] = field(default_factory=list)
    gradient: Tensor = field(default_factory=lambda: torch.zeros(()))
    batch: Tensor = field(default_factory=lambda: torch.zeros(()))
    fisher: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, found: BlockStatistics, memory: float) -> None:
        self.weight = memory * self.weight + 1
        for name in ("gradient", "batch", "fisher"):
            new, old = getattr(found, name), getattr(self, name)
            setattr(self, name, old + (new - old) / self.weight)
        self.loss += (found.loss - self.loss) / self.weight
        self.steps, self.rows = self.steps + 1, self.rows + found.rows
        self.names, self.batch_size = list(found.names), found.batch_size

    def value(self) -> BlockStatistics:
        return BlockStatistics(tuple(self.names), self.gradient, self.batch, self.fisher, self.rows, self.batch_size, self.loss)

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


class ClosedForm(ExpectedDecrease):
    """The same measurements; in place of training, the policy follows from them.

    Args:
        rule: Makes scales of the statistics; without it: the ratio of signal to curvature.
        warm_up: Steps of a place (a task, at a level of its loss where the rule asks for that) before its statistics count.
        together: Rows per backward when their own gradients are measured; 1: one by one, the least memory.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, rule: ScaleRule | None = None, warm_up: int = 8, together: int = 8) -> None:
        super().__init__(warm_up=warm_up, together=together)
        self.rule = rule if rule is not None else Ratio()
        #: Why there are no scales yet.
        self.reason = ""

    def _level(self, loss: float) -> int:
        return bisect.bisect(self.rule.levels, loss)

    def solve(self, blocks: Sequence[BlockInfo]) -> Policy | None:
        """The policy by all places' statistics so far; none while they show no signal.

        Args:
            blocks: What it is for.
        """
        ready = [mean.value() for mean in self._means.values() if mean.steps >= self.warm_up]
        self.reason = "" if ready else f"no task has {self.warm_up} steps"
        try:
            return self.rule(blocks, ready) if ready else None
        except ValueError as error:  # no signal above the noise, so far
            self.reason = str(error)
            return None

"""The zeroth-order step as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from zolightning.estimators.base import Estimator
from zolightning.estimators.two_point import TwoPoint
from zolightning.objectives.base import total
from zolightning.optim.rules import SGD, Rule
from zolightning.samplers.base import Sampler
from zolightning.samplers.gaussian import GaussianSampler
from zolightning.spaces.base import SetupReport, Space
from zolightning.spaces.interrupts import uninterrupted

log = logging.getLogger("zolightning")

_LOOK_EVERY = 32  # steps between two looks at the device's count of skipped steps


class Rows(Protocol):
    """Per-row losses: the second form of a closure."""

    def __call__(self, copies: int) -> tuple[Tensor, Tensor]: ...


class ZOOptimizer(torch.optim.Optimizer):
    r"""Steps from loss values alone.

    One step draws directions :math:`u_q`, evaluates the loss at the estimator's probes :math:`\theta \pm \epsilon u_q`
    and moves the weights by the rule. With the defaults,

    .. math:: \theta_i \leftarrow \theta_i - \eta\, \frac{\ell(\theta + \epsilon u) - \ell(\theta - \epsilon u)}{2 \epsilon}
              \, \sigma_i z_i .

    The weights are read-only while probing and 16-bit weights are rounded stochastically in the update, so small learning rates
    work in bfloat16 and float16. All randomness is a pure function of ``(seed, step)``. A step whose loss is not finite is
    skipped and counted.

    Args:
        space: What moves.
        sampler: Distribution of the directions; ``None``: Gaussian.
        estimator: Probes and coefficients; ``None``: two-point with one direction.
        lr: Learning rate, in MeZO's units. Full fine-tuning wants about 1e-5 for 100 million parameters and 1e-7 to 1e-6 for
            billions.
        eps: Probe distance, in units of the weights.
        seed: Seed of all directions, 0 to 2**64 - 1.
        rule: Update rule; ``None``: :class:`SGD` without weight decay.
        max_skipped: Stop with an error after about this many non-finite steps in a row.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> optimizer = ZOOptimizer(DenseSpace(model.eval()), lr=1e-6, eps=1e-3)
        >>> loss = optimizer.step(lambda: loss_function(model(x), y))

    References:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023.
    """

    def __init__(
        self,
        space: Space,
        sampler: Sampler | None = None,
        estimator: Estimator | None = None,
        *,
        lr: float = 1e-6,
        eps: float = 1e-3,
        seed: int = 0,
        rule: Rule | None = None,
        max_skipped: int = 64,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be positive and finite")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must be between 0 and 2**64 - 1")
        if max_skipped < 1:
            raise ValueError(f"max_skipped={max_skipped} must be at least 1")
        self.space = space
        self.sampler = sampler if sampler is not None else GaussianSampler()
        self.estimator = estimator if estimator is not None else TwoPoint()
        self.rule = rule if rule is not None else SGD()
        self.max_skipped = max_skipped
        self.sampler.bind(space)
        #: What the set-up probe found; ``None`` before the first step.
        self.setup_report: SetupReport | None = None
        #: Coefficients of the latest step: shape ``[queries]``, on the device.
        self.coefficients: Tensor | None = None
        defaults = {"lr": lr, "base_lr": lr, "eps": eps, "seed": seed, "step": 0, "forwards": 0}
        super().__init__([block.tensor for block in space.blocks], defaults)
        zero = torch.zeros((), dtype=torch.int64, device=space.device)
        self.state["skipped"] = {"total": zero, "in_a_row": zero.clone()}  # type: ignore[index]

    @property
    def forwards(self) -> int:
        """Loss evaluations so far; the set-up probe is not counted."""
        return int(self.param_groups[0]["forwards"])

    @property
    def steps(self) -> int:
        """Steps so far, skipped ones included."""
        return int(self.param_groups[0]["step"])

    @property
    def skipped(self) -> int:
        """Steps skipped because a loss was not finite (waits for the device)."""
        return int(self.state["skipped"]["total"])  # type: ignore[index]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the space decides what moves.

        Raises:
            ValueError: A group is there already.
        """
        if self.param_groups:
            raise ValueError("ZOOptimizer moves the blocks of its space and takes no further parameter groups")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any], bound: Any = None) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: Evaluates the loss of the step's batch without changing anything: returns a 0-d tensor or a number. An
                objective bound to a batch (:meth:`zolightning.objectives.Objective.on`) is one, and tells its rows apart.
            bound: The bound objective itself, where the closure is wrapped by something else (Lightning does that).

        Returns:
            Mean of the probe losses: 0-d, on the space's device.

        Raises:
            ValueError: At the first step: the probe is not sound (see :meth:`Space.verify`). At any: the loss is not 0-d.
            RuntimeError: Too many steps in a row gave a loss that is not finite. The weights are intact.
        """
        group = self.param_groups[0]
        bound = bound if bound is not None else closure
        rows: Rows | None = getattr(bound, "rows", None)
        hold = bool(getattr(bound, "hold", False))
        evaluate = (lambda: total(*rows(1))[0]) if rows is not None else closure
        directions = self.sampler.directions(group["seed"], group["step"], self.estimator.queries)
        with exact_float32():
            if self.setup_report is None:
                self.setup_report = self._set_up(lambda: self._loss(evaluate), directions[0], group["eps"], hold)
            losses = []
            for probe in self.estimator.probes:
                with self.space.probe(directions[probe.query], probe.sign * group["eps"], hold):
                    losses.append(self._loss(evaluate))
        stacked = torch.stack(losses)
        valid = torch.isfinite(stacked).all()
        self.coefficients = self.estimator.coefficients(stacked, group["eps"])
        weights, shrink = self.rule.move(self.coefficients, group["lr"])
        with uninterrupted():  # the weights and their step counter move together
            self.space.move(directions, weights, shrink, valid)
            group["step"] += 1
            group["forwards"] += len(losses)
        self._count_skipped(valid)
        return stacked.mean()

    def _loss(self, evaluate: Callable[[], Any]) -> Tensor:
        loss = torch.as_tensor(evaluate(), dtype=self.space.compute_dtype, device=self.space.device)
        if loss.dim() != 0:
            raise ValueError(f"the closure must return a 0-d loss, got shape {tuple(loss.shape)}")
        return loss

    def _set_up(self, evaluate: Callable[[], Tensor], direction: Any, eps: float, hold: bool) -> SetupReport:
        report = self.space.verify(evaluate, direction, eps, hold)
        if not math.isfinite(report.loss) and self.steps == 0:  # a resumed run skips such a step, as it would have before
            dtype = str(self.space.blocks[0].dtype).removeprefix("torch.")
            raise ValueError(f"the loss at the set-up probe is {report.loss}: the model overflows in {dtype}, or eps={eps:g} is too large")
        if report.unread:
            log.warning("%d blocks were not read by the first probe, for example %r", len(report.unread), report.unread[0])
        if report.unresolved:
            log.info("%d blocks barely change at eps=%g, for example %r", len(report.unresolved), eps, report.unresolved[0])
        return report

    def _count_skipped(self, valid: Tensor) -> None:
        skipped = self.state["skipped"]  # type: ignore[index]
        missed = (~valid).to(torch.int64)
        skipped["total"] = skipped["total"] + missed
        skipped["in_a_row"] = (skipped["in_a_row"] + missed) * missed
        if self.steps % min(_LOOK_EVERY, self.max_skipped) == 0 and (row := int(skipped["in_a_row"])) >= self.max_skipped:
            raise RuntimeError(
                f"{row} steps in a row (to step {self.steps}) gave a loss that is not finite; the weights are those of step "
                f"{self.steps - row}. Lower lr={self.param_groups[0]['lr']:g} or eps={self.param_groups[0]['eps']:g}, or check the data"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: The state belongs to another number of blocks.
        """
        saved = sum(len(group["params"]) for group in state_dict["param_groups"])
        if saved != len(self.space.blocks):
            own = len(self.space.blocks)
            raise ValueError(f"the optimizer state is of {saved} blocks, this space has {own}: a checkpoint of another model?")
        super().load_state_dict(state_dict)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Switch TF32 off: differences of two losses are too small for it."""
    if not torch.cuda.is_available():
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, convolution.fp32_precision
    matmul.fp32_precision = convolution.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before

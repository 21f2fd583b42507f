"""The zeroth-order step as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from zolightning.estimators.base import Estimator
from zolightning.estimators.two_point import TwoPoint
from zolightning.objectives.base import BoundObjective
from zolightning.optim.graphs import StepGraphs, streams
from zolightning.optim.history import History, Row
from zolightning.optim.looks import Looks
from zolightning.optim.precision import exact_float32
from zolightning.optim.probing import Form, choose_form, probe_losses
from zolightning.optim.replicas import Replicas
from zolightning.optim.rules import SGD, Rule
from zolightning.optim.skips import SkippedSteps
from zolightning.optim.verification import verify
from zolightning.samplers.base import Direction, Sampler
from zolightning.samplers.gaussian import GaussianSampler
from zolightning.spaces.base import SetupReport, Space
from zolightning.spaces.interrupts import uninterrupted


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
        pair: Evaluate both signs of a probe in one forward of twice the rows, so that weights and noise are made once;
            ``None``: on a GPU, if a comparison before the first step finds the same row losses.
        capture: Replay steps as CUDA graphs; ``None``: on a GPU, if nothing in the step waits for the device.
        compile: Run repeated layers through ``torch.compile``; ``None``: where steps are captured. The first step
            then takes up to half a minute longer.

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
        pair: bool | None = None,
        capture: bool | None = None,
        compile: bool | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be positive and finite")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must be between 0 and 2**64 - 1")
        if max_skipped < 1:
            raise ValueError(f"max_skipped={max_skipped} must be at least 1")
        self.space = space
        space.locate()
        space.catch_up()
        self.sampler = sampler if sampler is not None else GaussianSampler()
        self.estimator = estimator if estimator is not None else TwoPoint()
        self.rule = rule if rule is not None else SGD()
        self.max_skipped = max_skipped
        self.sampler.bind(space)
        space.prepare(self.sampler, seed, 0)
        #: What the set-up probe found; ``None`` before the first step.
        self.setup_report: SetupReport | None = None
        #: Probe losses and coefficients of the latest step: shapes ``[probes]`` and ``[queries]``, on the device.
        self.losses: Tensor | None = None
        self.coefficients: Tensor | None = None
        #: Other processes that share the evaluation of every step; ``None``: this one alone. Set it before the first step.
        self.replicas: Replicas | None = None
        #: The looks that somebody takes at weights whose moves are deferred.
        self.looks = Looks()
        self._wanted = {"pair": pair, "capture": capture, "compile": compile}  # in the order of Form
        defaults = {"lr": lr, "base_lr": lr, "eps": eps, "seed": seed, "step": 0, "forwards": 0, "form": None}
        super().__init__([block.tensor for block in space.blocks], defaults)
        # What a captured step reads and writes on the device; load_state_dict() writes into the same tensors.
        self._lr = torch.full((), lr, dtype=space.compute_dtype, device=space.device)
        self._clock = torch.zeros((), dtype=torch.int64, device=space.device)
        self._on_device = (lr, 0)  # what these two hold
        self._skipped = SkippedSteps(torch.zeros(2, dtype=torch.int64, device=space.device), max_skipped)
        self._graphs = StepGraphs(self._compute)
        self._side = streams(space.device.index)[1] if space.device.type == "cuda" else None
        probes, constant = len(self.estimator.probes), self.sampler.constant_scales and space.active(self._clock) is None
        #: What the latest steps did.
        self.history = History(self.estimator.queries, probes, self.sampler.scales(), constant, space.compute_dtype)
        self._recorded: deque[Row] = deque()  # coming steps whose losses are known

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
        return int(self._skipped.counts[0])

    @property
    def deferred(self) -> bool:
        """Whether moves may wait: of low rank beside the weights, others for the next captured step, whose probes then make them.

        Who looks at the weights calls :meth:`settle` first.
        """
        return self.space.deferred

    @deferred.setter
    def deferred(self, deferred: bool) -> None:
        self.settle()
        if self.history.sink is not None:
            self.history.drain(self.steps)  # earlier steps were made otherwise
        self.space.deferred = deferred

    @property
    def apart(self) -> bool:
        """Whether moves of low rank wait beside the weights. To bring them in rounds 16-bit weights once more, so it is put on record."""
        return self.deferred and bool(self.space.held)

    def settle(self) -> None:
        """Bring deferred moves into the weights.

        Raises:
            RuntimeError: It repeats steps that were made without such a look at the weights.
        """
        self.space.catch_up()
        if self.apart:
            self.looks.take(self.space, self.param_groups[0]["seed"], self.steps, self.repeating)

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
        work: Callable[[], Any] = bound if hasattr(bound, "rows") else closure
        self.history.make_room(group["step"])
        self._set_clock(group["lr"], group["step"])
        if self.sampler.reads_weights(group["step"]):
            self.space.catch_up()
        self.sampler.refresh(group["step"])
        self.space.prepare(self.sampler, group["seed"], group["step"])
        if self._recorded:
            self.losses, self.coefficients = self._repeat(self._recorded.popleft())
            return self.losses.mean()
        with exact_float32():
            if self.setup_report is None:
                self._set_up(work, group["eps"])
            with uninterrupted() if self._form.captured else nullcontext():
                if self._form.captured and isinstance(work, BoundObjective) and not work.hold:
                    settings = (group["seed"], group["eps"], self.deferred, self.space.held)
                    with self._walk():
                        self.losses, self.coefficients = self._graphs.run(work, settings)
                    self._count_step()
                else:
                    self.losses, self.coefficients = self._compute(work, True)
        self._stop_if_hopeless()
        if self.replicas is not None:
            self.replicas.check(self.steps, self.space, work)
        return self.losses.mean()

    def _compute(self, work: Callable[[], Any], live: bool) -> tuple[Tensor, Tensor]:
        """The step on the device: losses and coefficients. Nothing in it waits, unless the closure does."""
        group = self.param_groups[0]
        if not live:
            self.space.catch_up()  # a rehearsal may fail half way, so no move waits for it
        hold = bool(getattr(work, "hold", False))
        form = self._form if isinstance(work, BoundObjective) and not hold else Form()
        directions = self._directions()
        losses = probe_losses(self.space, self.estimator.probes, directions, group["eps"], work, form, hold, self.replicas)
        valid = torch.isfinite(losses).all() & live
        coefficients = self.estimator.coefficients(losses, group["eps"])
        weights, shrink = self.rule.move(coefficients, self._lr)
        self.history.write(self._clock, self._lr, coefficients, losses, valid, directions[0].scales)
        if not live:
            self.space.move(directions, weights, shrink, valid)
            return losses, coefficients
        with uninterrupted():  # the weights and their step counter move together
            self._change(directions, weights, shrink, losses, valid)
            if not form.captured:
                self._count_step()
        return losses, coefficients

    def _walk(self) -> AbstractContextManager[None]:
        """Context of a captured step."""
        group = self.param_groups[0]
        if self.estimator.queries == 1:
            return self.space.walk(self.sampler, group["seed"], group["step"])
        self.space.catch_up()  # another optimizer's
        return nullcontext()

    def _directions(self) -> tuple[Direction, ...]:
        """The directions of the coming step: blocks that do not take their turn in it have scale 0."""
        group = self.param_groups[0]
        directions = self.sampler.directions(group["seed"], group["step"], self.estimator.queries, self._clock)
        active = self.space.active(self._clock)
        if active is None:
            return directions
        scales = self.sampler.restrict(directions[0].scales, active)
        return tuple(replace(direction, scales=scales) for direction in directions)

    def _change(self, directions: Sequence[Direction], weights: Tensor, shrink: Tensor, losses: Tensor, valid: Tensor) -> None:
        """The change of the weights and of everything that counts it, on the device. The sampler's part runs beside the update."""
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.space.device))
        with torch.cuda.stream(self._side) if self._side is not None else nullcontext():
            self.sampler.observe(losses)
        self.space.move(directions, weights, shrink, valid)
        if self._side is not None:
            torch.cuda.current_stream(self.space.device).wait_stream(self._side)
        self._skipped.count(valid)
        self._clock.add_(1)

    def repeat(self, rows: Iterable[Row], looks: Iterable[int] = ()) -> None:
        """Take the coming steps as a record has them, instead of evaluating losses; :meth:`step` then does not look at its closure.

        The weights, the sampler and all counts end as they did when the record was made.

        Args:
            rows: The coming steps, in order; the first is the one of :attr:`steps`.
            looks: Steps at which :meth:`settle` was called.

        Raises:
            ValueError: They are other steps.
        """
        rows = tuple(rows)
        if [row.step for row in rows] != list(range(self.steps, self.steps + len(rows))):
            raise ValueError(f"the recorded steps do not go on from step {self.steps}")
        self._recorded, self.looks.recorded = deque(rows), frozenset(looks)

    def release(self) -> None:
        """Let go of captured steps. Replicas have to, before their process group is destroyed: NCCL waits for graphs that it is part of."""
        self._graphs.clear()

    @property
    def repeating(self) -> bool:
        """Whether the next step is one of :meth:`repeat`."""
        return self.recorded > 0

    @property
    def recorded(self) -> int:
        """How many of the next steps are those of :meth:`repeat`."""
        return len(self._recorded)

    def _repeat(self, row: Row) -> tuple[Tensor, Tensor]:
        """One step of :meth:`repeat`; whoever made the record has its row."""
        lr, losses, coefficients = (
            torch.tensor(value, dtype=self.space.compute_dtype, device=self.space.device)
            for value in (row.lr, row.losses, row.coefficients)
        )
        valid, scales = torch.tensor(row.valid, device=self.space.device), row.scales.to(self.space.device)
        directions = self._directions()
        weights, shrink = self.rule.move(coefficients, lr)
        with uninterrupted():
            self._change([replace(direction, scales=scales) for direction in directions], weights, shrink, losses, valid)
            self._count_step()
            self.history.restart(self.steps)
        return losses, coefficients

    def _count_step(self) -> None:
        group = self.param_groups[0]
        group["step"] += 1
        group["forwards"] += len(self.estimator.probes)
        self._on_device = (self._on_device[0], group["step"])

    def _set_clock(self, lr: float, step: int) -> None:
        """Tell the device the learning rate and the step, where it does not know them already."""
        if self._on_device != (lr, step):
            self._lr.fill_(lr)
            self._clock.fill_(step)
            self._on_device = (lr, step)

    @property
    def _form(self) -> Form:
        """How losses are evaluated: settled before the first step, and kept by a run that is resumed."""
        form = self.param_groups[0]["form"]
        return Form(**form) if form else Form()

    def _set_up(self, work: Callable[[], Any], eps: float) -> None:
        group = self.param_groups[0]
        direction = self._directions()[0]
        own = work if self.replicas is None else self.replicas.own(work)
        self.setup_report = verify(self.space, own, direction, eps, fresh=self.steps == 0)
        chosen = (self._form.paired, self._form.captured, self._form.compiled)
        kept = group["form"] is not None and self._form.device == self.space.device.type
        if not kept or any(want not in (None, choice) for want, choice in zip(self._wanted.values(), chosen, strict=True)):
            group["form"] = None
            if isinstance(work, BoundObjective) and isinstance(own, BoundObjective):
                form = choose_form(self.space, own, direction, eps, self._wanted, lambda form: self._obstacle(work, form), self._agree)
                group["form"] = asdict(form)

    def _agree(self, reason: str) -> str:
        return reason if self.replicas is None else self.replicas.agree(reason, self.space.device)

    def _obstacle(self, bound: BoundObjective, form: Form) -> str:
        """Why a step in some form cannot be captured; empty: it can."""
        group = self.param_groups[0]
        for part in (bound.objective, self.sampler, self.rule, self.replicas):
            if part is not None and not part.capturable:
                return f"{type(part).__name__} does not say that it may be captured"
        directions = self._directions()
        if self.space.device.type != "cuda" or not self.space.fusable(directions):
            return "the kernels for it run on a GPU, and know Gaussian and Rademacher noise"
        group["form"] = asdict(form)
        try:
            place = self._graphs.rehearse(bound)
            return f"the step waits for the device ({place})" if place else ""
        finally:
            group["form"] = None

    def _stop_if_hopeless(self) -> None:
        found = self._skipped.too_many(self.steps)
        if found is not None:
            row, step = found
            raise RuntimeError(
                f"{row} steps in a row (to step {step}) gave a loss that is not finite; the weights are those of step "
                f"{step - row}. Lower lr={self.param_groups[0]['lr']:g} or eps={self.param_groups[0]['eps']:g}, or check the data"
            )

    def state_dict(self) -> dict[str, Any]:
        """Settings, counters, and the sampler's tensors; no noise, no momentum, nothing of the weights' size. The weights are settled."""
        self.settle()
        state = super().state_dict()
        state["state"] = {"skipped": self._skipped.counts.clone(), "sampler": {k: v.clone() for k, v in self.sampler.state().items()}}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: The state belongs to another number of blocks, or to another kind of sampler.
        """
        saved, own = sum(len(group["params"]) for group in state_dict["param_groups"]), len(self.space.blocks)
        if saved != own:
            raise ValueError(f"the optimizer state is of {saved} blocks, this space has {own}: a checkpoint of another model?")
        state = state_dict["state"]
        self.sampler.load_state(state["sampler"])
        self.space.drop()
        super().load_state_dict({**state_dict, "state": {}})
        self.history.restart(self.steps)
        self.looks.latest = self.steps
        self._skipped.counts.copy_(state["skipped"])

"""The forms in which the losses of a step are evaluated, and the choice between them.

One probe after another always works. Two things make it faster where the model allows them: both signs of a probe in one forward
of twice the rows, and compiled layers. Neither is believed: before the first step their row losses are compared with those of
plain probes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from zolightning.estimators.base import Probe
from zolightning.objectives.base import BoundObjective, total
from zolightning.objectives.batch import bucket, with_padding
from zolightning.objectives.forward import forwards
from zolightning.optim.replicas import Read, Replicas
from zolightning.samplers.base import Direction
from zolightning.spaces.base import Space

log = logging.getLogger("zolightning")

# The comparison at set-up is made this much further out, so that signs and directions matter more than rounding; where rounding still
# matters more (16-bit models with small adapters, activations of 8 bits), further.
_CHECK_EPS = (8, 64, 512)
# Largest difference of the row losses of two forms, in 32 and in 16 bits, where deep models round a tenth of a loss away: relative to the
# difference that the sign of a probe makes, and relative to the losses, where a look further out may show that it was rounding.
_CHECK_ERROR = (0.1, 0.25)
_ROUNDING = (0.05, 0.25)
_RECOMPILES = 64  # layers that differ in a number or a flag are compiled one by one; torch stops at 8


@dataclass(frozen=True)
class Form:
    """How the losses of a step are evaluated.

    Args:
        paired: Both signs of a probe in one forward.
        captured: The whole step as a CUDA graph.
        compiled: Layers through ``torch.compile``.
        device: Type of the device for which that was found right.
    """

    paired: bool = False
    captured: bool = False
    compiled: bool = False
    device: str = "cpu"


def probe_losses(
    space: Space,
    probes: Sequence[Probe],
    directions: Sequence[Direction],
    eps: float,
    closure: Callable[[], Any],
    form: Form,
    hold: bool,
    replicas: Replicas | None = None,
) -> Tensor:
    """Losses of the probes, in their order.

    Args:
        space: What is probed.
        probes: The estimator's probes.
        directions: One per query.
        eps: Probe distance.
        closure: The loss, or an objective bound to a batch.
        form: How.
        hold: As for :meth:`Space.probe`.
        replicas: Other processes that evaluate a part of it; ``None``: this one alone.

    Returns:
        Shape ``[probes]``, of the space's :attr:`compute_dtype`, on its device.
    """

    def evaluate(own: Sequence[Probe], read: Read) -> Tensor:
        """What is read in some of the probes, one after another: ``[own, ...]``."""
        values: list[Tensor] = []
        with compiled_layers(space) if form.compiled else nullcontext():
            for first, second in _couples(own, form.paired):
                direction, distance = directions[first.query], first.sign * eps
                with space.probe(direction, distance, hold) if second is None else space.pair(direction, distance):
                    values += read(1 if second is None else 2)
        return torch.stack([value.to(space.device, space.compute_dtype) for value in values])

    def losses(copies: int) -> Sequence[Tensor]:
        if copies == 1:
            return [loss_of(closure, space)]
        assert isinstance(closure, BoundObjective)
        return total(*closure.rows(copies)).unbind()

    return evaluate(probes, losses) if replicas is None else replicas.losses(probes, closure, evaluate, losses)


def loss_of(closure: Callable[[], Any], space: Space) -> Tensor:
    """The closure's loss on the space's device.

    Raises:
        ValueError: It is not 0-d.
    """
    loss = torch.as_tensor(closure(), dtype=space.compute_dtype, device=space.device)
    if loss.dim() != 0:
        raise ValueError(f"the closure must return a 0-d loss, got shape {tuple(loss.shape)}")
    return loss


def _couples(probes: Sequence[Probe], paired: bool) -> Iterator[tuple[Probe, Probe | None]]:
    """Neighbours of one query and opposite signs together, where both signs go through one forward."""
    rest = list(probes)
    while rest:
        first = rest.pop(0)
        if paired and rest and rest[0] == (first.query, -first.sign):
            yield first, rest.pop(0)
        else:
            yield first, None


def choose_form(
    space: Space,
    bound: BoundObjective,
    direction: Direction,
    eps: float,
    wanted: dict[str, bool | None],
    obstacle: Callable[[Form], str],
    agree: Callable[[str], str] = str,
) -> Form:
    """The fastest form that is right for this model.

    Args:
        space: What is probed.
        bound: Objective and first batch.
        direction: A direction to compare along.
        eps: Probe distance.
        wanted: ``pair``, ``capture`` and ``compile``: yes, no, or ``None`` for where it works and pays.
        obstacle: Rehearses a step in some form; says why it cannot be captured, or nothing.
        agree: Called with the reason against a form, if any; gives that of all replicas.

    Raises:
        ValueError: A form that was asked for is not right for this model.
    """
    form, on_gpu = Form(device=space.device.type), space.device.type == "cuda"
    wants = {name: on_gpu if choice is None else choice for name, choice in wanted.items()}
    if bound.hold or not any(wants.values()):
        return form
    bound = bound.to(with_padding(bucket(bound.batch)))
    plain, references = form, dict[int, Tensor]()
    short = any(parameter.dtype.itemsize < 4 for parameter in space.model.parameters())
    allowed, rounding = _CHECK_ERROR[short], _ROUNDING[short]

    def agrees(candidate: Form) -> str:
        """Empty, or why not."""
        reason, still = "", None
        for further in _CHECK_EPS:
            if further not in references:
                references[further] = _rows(space, bound, direction, eps * further, plain)
            reference = references[further]
            try:
                still = _rows(space, bound, direction, 0.0, candidate) if still is None else still
                rows = _rows(space, bound, direction, eps * further, candidate)
            except (torch.OutOfMemoryError, RuntimeError, NotImplementedError, IndexError, TypeError, ValueError) as error:
                return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            gap, signal = (rows - reference).norm(), (reference[0] - reference[1]).norm()
            apart = (still[0] - still[1]).norm()  # without any perturbation both signs are the same rows with the same weights
            if not apart <= allowed * signal / further + 1e-6 * reference.norm():
                return f"row losses of equal weights differ by {float(apart):.2g} between the two signs"
            if gap <= allowed * signal + 1e-6 * reference.norm():
                return ""
            reason = reason or f"row losses differ by {float(gap):.2g}, where the two signs differ by {float(signal):.2g}"
            if not gap <= rounding * reference.norm():
                break
        return reason

    def take(option: str, better: Form, reason: str) -> Form:
        """The better form, unless there is a reason against it."""
        reason = agree(reason)
        if reason and wanted[option]:
            raise ValueError(f"{option}=true does not work here: {reason}")
        if reason:
            log.info("%s: no, %s", option, reason)
        return form if reason else better

    if wants["pair"]:
        better = replace(form, paired=True)
        form = take("pair", better, agrees(better) if space.pairable else "a module with weights has modules inside")
    if wants["capture"]:
        form = take("capture", replace(form, captured=True), obstacle(form))
    if wants["compile"] and (form.captured or wanted["compile"]):
        better = replace(form, compiled=True)
        form = take("compile", better, agrees(better) if space.layers else "there are no repeated layers")
    return form


def _rows(space: Space, bound: BoundObjective, direction: Direction, eps: float, form: Form) -> Tensor:
    """Row losses of both signs, ``[2, B]``."""
    with compiled_layers(space) if form.compiled else nullcontext():
        if form.paired:
            with space.pair(direction, eps):
                loss, weight = bound.rows(2)
            return loss / weight
        rows = []
        for sign in (1, -1):
            with space.probe(direction, sign * eps):
                loss, weight = bound.rows(1)
            rows.append(loss[0] / weight[0])
        return torch.stack(rows)


@contextmanager
def compiled_layers(space: Space) -> Iterator[None]:
    """Run the repeated layers of the space's model through ``torch.compile``: compiled once, used by all of them."""
    import torch._dynamo.config as config

    layers = [layer for layer in space.layers if "forward" not in vars(layer)]  # accelerate's has to run
    compiled = {layer: partial(_compiled(type(layer)), layer) for layer in layers}  # type: ignore[arg-type]
    try:
        space.compiled = True
        with forwards(compiled), config.patch(recompile_limit=_RECOMPILES, accumulated_recompile_limit=16 * _RECOMPILES):
            yield
    finally:
        space.compiled = False


@cache
def _compiled(kind: Any) -> Callable[..., Any]:
    import torch._inductor

    # Timings must not choose between kernels whose sums have another order: a run that is resumed has the same bits.
    options: dict[str, Any] = {"deterministic": True} if "deterministic" in torch._inductor.list_options() else {}
    return torch.compile(kind.forward, options=options)

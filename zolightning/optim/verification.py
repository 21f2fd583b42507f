"""The probe before the first step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from zolightning.optim.probing import loss_of
from zolightning.samplers.base import Direction
from zolightning.spaces.base import SetupReport, Space

log = logging.getLogger("zolightning")


def verify(space: Space, work: Callable[[], Any], direction: Direction, eps: float, fresh: bool) -> SetupReport:
    """Make sure that a probe is sound; say what it found.

    Args:
        space: What is probed.
        work: The loss.
        direction: A direction to probe along.
        eps: Probe distance.
        fresh: Whether the run begins here; one that is resumed skips a step whose loss is not finite, as it would have before.

    Raises:
        ValueError: It is not (see :meth:`Space.verify`), or the loss is not finite.
    """
    report = space.verify(lambda: loss_of(work, space), direction, eps, bool(getattr(work, "hold", False)))
    if not math.isfinite(report.loss) and fresh:
        dtype = str(space.blocks[0].dtype).removeprefix("torch.")
        raise ValueError(f"the loss at the set-up probe is {report.loss}: the model overflows in {dtype}, or eps={eps:g} is too large")
    if report.unread:
        log.warning("%d blocks were not read by the first probe, for example %r", len(report.unread), report.unread[0])
    if report.unresolved:
        log.info("%d blocks barely change at eps=%g, for example %r", len(report.unresolved), eps, report.unresolved[0])
    return report

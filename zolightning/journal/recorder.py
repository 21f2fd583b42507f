"""Keeps a run's journal: takes what the optimizer's ring holds, and writes it down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from zolightning.journal.contents import Journal
from zolightning.journal.file import Appender, Back, Place, pack_back, pack_look, pack_rows, set_aside
from zolightning.journal.settings import Settings, settings_of
from zolightning.optim.history import Row
from zolightning.optim.optimizer import ZOOptimizer


def mean_loss(row: Row) -> float:
    """Mean of a step's losses; nan where the step was skipped."""
    return sum(row.losses) / len(row.losses) if row.valid else math.nan


class Recorder:
    """Writes the steps of an optimizer into a journal.

    Nothing is written before the first step: a run that is refused leaves the journal of an earlier one as it is. Then that one is
    renamed to ``previous.zo`` (or ``previous-2.zo``, ...), or continued.

    Args:
        path: The journal.
        optimizer: Whose steps; with the weights as they are before its next step.
        base: Hub id or folder of the base model.
        earlier: The journal to go on with, as it was read from ``path``.
        keep: How many steps of it to keep; ``None``: all.
        writes: Write; false on all processes of a run but one.

    Example:
        >>> recorder = Recorder("journal.zo", optimizer, "my-model")
        >>> for batch in batches:
        ...     optimizer.step(closure(batch))
        >>> recorder.drain()
        >>> recorder.sync()
    """

    def __init__(
        self,
        path: str | Path,
        optimizer: ZOOptimizer,
        base: str = "",
        earlier: Journal | None = None,
        keep: int | None = None,
        writes: bool = True,
    ) -> None:
        self.path, self.optimizer, self.writes = Path(path), optimizer, writes
        #: Where the journal ends; ``None``: there is none yet.
        self.place: Place | None = None
        #: Mean loss of each step since the start or the last return; nan where it was not finite.
        self.losses: list[float] = []
        #: Returns so far.
        self.returns = 0
        self._settings = settings_of(optimizer, base, earlier.first if earlier is not None else None)
        self._written: Settings | None = None
        self._carried: list[Row] = []  # rows of the earlier journal that its last frame must not lose
        self._scales: Tensor | None = None
        self._appender: Appender | None = None
        if earlier is not None:
            keep = earlier.steps if keep is None else keep
            self.place, self._carried = (earlier.end, []) if keep == earlier.steps else earlier.cut(keep)
            kept = earlier.entries[: keep - earlier.first.start]
            self._written = earlier.settings_at(self.place)
            backs = [back.step for back in earlier.backs if back.step <= keep]
            since, self.returns = max(backs, default=0), len(backs)
            self.losses = [mean_loss(entry.row) for entry in kept if entry.row.step >= since]
        optimizer.history.restart(optimizer.steps)
        optimizer.history.sink = self._take
        optimizer.looks.sink = self.look

    @property
    def beginning(self) -> int:
        """Step at which the journal begins."""
        return self._settings.start

    @property
    def noise(self) -> str:
        """How the settings of the present steps name their noise."""
        return self._settings.noise

    @property
    def opened(self) -> bool:
        """Whether the journal is being written."""
        return self._appender is not None

    def drain(self) -> None:
        """Write the steps that are finished; this waits for the device.

        Raises:
            OSError: The disk is full, or gone.
        """
        self.optimizer.history.drain(self.optimizer.steps)

    def go_back(self, back: Back) -> None:
        """Write down a return to earlier weights.

        Raises:
            OSError: The disk is full, or gone.
        """
        self.drain()
        self.losses.clear()
        self.returns += 1
        self._append((b"B", pack_back(back)))

    def look(self, step: int) -> None:
        """Write down that somebody looked at the weights, so that deferred moves were brought into them.

        Raises:
            OSError: The disk is full, or gone.
        """
        self.drain()
        if self.place is not None:
            self._write_carried(self.optimizer.forwards)
            self._append((b"L", pack_look(step)))

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        if self._appender is not None:
            self._appender.sync()

    def close(self) -> None:
        """Let go of the file; later steps are not written."""
        self.optimizer.history.sink = self.optimizer.looks.sink = None
        if self._appender is not None:
            self._appender.close()
            self._appender = None

    def _take(self, rows: Sequence[Row]) -> None:
        self.losses += map(mean_loss, rows)
        forwards = self.optimizer.forwards - len(rows) * self._settings.probes
        self._write_carried(forwards)
        group = self.optimizer.param_groups[0]
        settings = replace(
            self._settings, form=group["form"], eps=float(group["eps"]), deferred=int(self.optimizer.apart)
        )  # the form is found in the first step
        scales = self._scales if settings == self._written else None
        parts = [] if settings == self._written else [(b"S", settings.to_bytes())]
        self._append(*parts, (b"R", pack_rows(rows, settings, scales, forwards)))
        self._written, self._scales = settings, rows[-1].scales

    def _write_carried(self, forwards: int) -> None:
        if self._carried and self._written is not None:
            carried, self._carried = self._carried, []
            self._append((b"R", pack_rows(carried, self._written, None, forwards - len(carried) * self._written.probes)))

    def _append(self, *parts: tuple[bytes, bytes]) -> None:
        if not self.writes:
            return
        if self._appender is None:
            if self.place is None:
                set_aside(self.path)
            self._appender = Appender(self.path, self.place)
        self._appender.append(*parts)
        self.place = self._appender.place

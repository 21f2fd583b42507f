"""Metrics of a run as one CSV file at a path that does not change."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint

Row = dict[str, Any]

_SHARE = 100  # the file is written for at most one hundredth of the time


class RunLogger(Logger):
    """Writes ``metrics.csv``; a resumed run goes on where its checkpoint stands.

    Args:
        folder: The run folder.
        name: File name; evaluation outside of training uses one of its own, so that it never touches the run's metrics.
    """

    def __init__(self, folder: str, name: str = "metrics.csv") -> None:
        super().__init__()
        self.path = Path(folder) / name
        self._rows: list[Row] | None = None
        self._first_step = 0
        self._written, self._took = 0.0, 0.0  # when the file was written last (monotonic clock), and how long it took

    @property
    def name(self) -> str:
        """No subfolder."""
        return ""

    @property
    def version(self) -> str:
        """No subfolder."""
        return ""

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in ``config.yaml``."""

    def start_at(self, step: int) -> None:
        """Keep the rows of an earlier run up to this step; 0 starts afresh."""
        self._first_step = step

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add figures to the row of a step; other values of figures that are there already start a row of their own."""
        if self._rows is None:
            self._rows = [row for row in self.rows() if int(float(row["step"])) <= self._first_step] if self._first_step else []
        values = {key: value.item() if isinstance(value, Tensor) else value for key, value in metrics.items()}
        number = step if step is not None else len(self._rows)
        values.pop("epoch", None)
        last = self._rows[-1] if self._rows else {}
        same = bool(last) and int(float(last["step"])) == number
        if same and all(float(last[name]) == float(values[name]) for name in values.keys() & last.keys()):
            self._rows[-1].update(values)
        else:
            self._rows.append({"step": number, **values})

    @rank_zero_only
    def save(self) -> None:
        """Write the file, unless that would take a noticeable share of the run's time: Lightning calls this at every line."""
        if time.monotonic() - self._written >= _SHARE * self._took:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the file as a whole, so that it is never torn."""
        if not self._rows:
            return
        start = time.monotonic()
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows)
        os.replace(partial, self.path)
        self._written = time.monotonic()
        self._took = self._written - start

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """A run that resumes from the checkpoint needs the rows up to there."""
        self.write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left; a run that failed before its first step leaves the rows of an earlier one."""
        if status != "failed" or any(int(float(row["step"])) > self._first_step for row in self._rows or ()):
            self.write()

    def rows(self) -> list[Row]:
        """The rows on disk."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]

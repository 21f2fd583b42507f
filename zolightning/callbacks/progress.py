"""The bar of a run: steps, loss, coefficient, forwards per second, peak memory."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class RunProgress(ProgressBar):
    """One bar over all steps of the run.

    Args:
        refresh_rate: Steps between two updates; each update waits for the device.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._seen = (0.0, 0)

    def disable(self) -> None:
        """Show nothing (other ranks)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        tqdm.write(" ".join(map(str, args)), file=sys.stdout)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._seen = (time.perf_counter(), self._forwards(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the bar at the first batch, below what the run says beforehand."""
        if self._bar is None:
            steps = trainer.max_steps if trainer.max_steps > 0 else None
            self._bar = tqdm(total=steps, initial=trainer.global_step, unit="step", file=sys.stdout, disable=not self._enabled, ncols=110)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar."""
        if self._bar is not None and (trainer.global_step % self.refresh_rate == 0 or trainer.global_step == trainer.max_steps):
            self._bar.set_postfix_str(", ".join(self._figures(trainer, pl_module)), refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar at the last step."""
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the line to the message."""
        if self._bar is not None:
            self._bar.close()

    def _figures(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        logged, (then, before) = trainer.callback_metrics, self._seen
        self._seen = (time.perf_counter(), self._forwards(pl_module))
        out = [f"{name} {float(logged[f'train/{name}']):.3f}" for name in ("loss", "coefficient") if f"train/{name}" in logged]
        out.append(f"{(self._seen[1] - before) / max(self._seen[0] - then, 1e-9):.1f} forwards/s")
        if torch.cuda.is_available():
            out.append(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        return out

    @staticmethod
    def _forwards(pl_module: Any) -> int:
        return int(pl_module.forwards)

"""A run that diverges goes back a while and goes on with a smaller learning rate."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from zolightning.callbacks.journal import RunJournal
from zolightning.journal import Back


class Divergence(Callback):
    """Watches the training loss; where it runs away, the weights become those of an earlier step and the learning rate shrinks.

    Every ``window`` steps the last ``window`` losses are looked at, which waits for the device. The weights are rebuilt from the base
    model and the run's journal; the count of steps, the batches and the directions go on. The return is part of the journal, so that
    resumed and replayed runs make it too. Not used unless it is named among the Trainer's callbacks.

    Args:
        window: Steps between two looks.
        rise: Nats by which the mean loss of a window may exceed the lowest mean of the windows since the last return.
        skipped: Share of the steps of a window that may be skipped because a loss is not finite.
        back: Steps to go back, from the beginning of the window that shows it.
        factor: Factor of the learning rate.
        limit: Returns after which the run stops instead.

    Raises:
        ValueError: An argument is out of range, or the run keeps no journal.
        RuntimeError: It diverges again after ``limit`` returns.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[RunJournal(), Divergence(rise=0.5)])
    """

    def __init__(
        self, window: int = 32, rise: float = 1.0, skipped: float = 0.5, back: int = 64, factor: float = 0.5, limit: int = 5
    ) -> None:
        for name, value in (("window", window), ("limit", limit)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if back < 0:
            raise ValueError(f"back={back} must not be negative")
        for name, share in (("rise", rise), ("skipped", skipped)):
            if not share >= 0:
                raise ValueError(f"{name}={share} must not be negative")
        if not 0 < factor < 1:
            raise ValueError(f"factor={factor} must be between 0 and 1")
        self.window, self.rise, self.skipped, self.back, self.factor, self.limit = window, rise, skipped, back, factor, limit

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the losses."""
        journal = next((callback for callback in trainer.callbacks if isinstance(callback, RunJournal)), None)  # type: ignore[attr-defined]
        if journal is None:
            raise ValueError("Divergence goes back by the run's journal: add zolightning.callbacks.RunJournal to the callbacks")
        step, recorder = trainer.global_step, journal.recorder
        if recorder is None or step % self.window or journal.repeating:
            return
        recorder.drain()
        reason = self._reason(recorder.losses)
        if reason and recorder.returns >= self.limit:
            raise RuntimeError(f"{reason} (step {step}), after {self.limit} returns to earlier weights: lower the learning rate")
        if reason:
            to = max(step - self.window - self.back, recorder.beginning)
            journal.go_back(pl_module, Back(step, to, self.factor))  # type: ignore[arg-type]
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            print(f"divergence   {reason} at step {step}: back to the weights of step {to}, lr={lr:g}", flush=True)

    def _reason(self, losses: list[float]) -> str:
        """Why the last window is one too many; empty: it is not."""
        whole = len(losses) // self.window
        parts = [losses[i * self.window : (i + 1) * self.window] for i in range(whole)]
        finite = [[loss for loss in part if math.isfinite(loss)] for part in parts]
        if not parts:
            return ""
        missing = self.window - len(finite[-1])
        if missing > self.skipped * self.window:
            return f"{missing} of {self.window} losses are not finite"
        means = [sum(part) / len(part) for part in finite if part]
        if len(means) > 1 and means[-1] > min(means[:-1]) + self.rise:
            return f"the loss has risen from {min(means[:-1]):.3f} to {means[-1]:.3f}"
        return ""

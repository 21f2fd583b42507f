"""Checkpoints of a run, at paths that do not change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from zolightning.journal.file import set_aside, sync_file, sync_folder


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run folder up to date.

    A run that starts afresh in the folder of another renames that one's to ``previous.ckpt`` (or ``previous-2.ckpt``, ...) after its
    first step.

    Args:
        every_n_train_steps: Steps between two checkpoints; one is also written at the end of training.
    """

    def __init__(self, every_n_train_steps: int = 500) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_train_steps, save_top_k=1, enable_version_counter=False)
        self._moving = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder: ``<default_root_dir>/checkpoints``."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save at intervals."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._moving and trainer.ckpt_path is None and trainer.is_global_zero:
            self._set_aside()
        self._moving = True
        if self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            self._save(trainer)

    def _set_aside(self) -> None:
        """Not before a step was taken: a run that is refused leaves everything as it is."""
        if previous := set_aside(Path(str(self.dirpath)) / "last.ckpt"):
            print(f"the checkpoint of the run before is now {previous}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state, however small ``max_steps`` is."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self.best_model_path = self.last_model_path = str(Path(str(self.dirpath)) / "last.ckpt")
            self._save_checkpoint(trainer, self.last_model_path)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write beside the file, then rename: Lightning itself goes through the system's temporary folder, often another disk."""
        partial = f"{filepath}.partial"
        try:
            trainer.save_checkpoint(partial, self.save_weights_only)
            if trainer.is_global_zero:
                sync_file(Path(partial))  # a name must not reach the disk before its content
                os.replace(partial, filepath)
                sync_folder(Path(filepath).parent)
        finally:
            if trainer.is_global_zero:
                Path(partial).unlink(missing_ok=True)  # of a full disk
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: the path never changes."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""

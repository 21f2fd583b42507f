"""Checkpoints of a run, at paths that do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run folder up to date.

    Args:
        every_n_train_steps: Steps between two checkpoints; one is also written at the end of training.
    """

    def __init__(self, every_n_train_steps: int = 500) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_train_steps, save_top_k=1, enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder: ``<default_root_dir>/checkpoints``."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state, however small ``max_steps`` is."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._save_checkpoint(trainer, str(Path(str(self.dirpath)) / "last.ckpt"))

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: the path never changes."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""

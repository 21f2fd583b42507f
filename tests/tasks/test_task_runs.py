"""Every task from its real rows through fit, validate and predict."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest

from zolightning.modules import ZOFinetuneModule
from zolightning.optim import ZOOptimizer
from zolightning.samplers import RademacherSampler
from zolightning.tasks import TASKS, TaskDataModule

FIGURES = {
    "candidates": {
        "val/loss",
        "val/accuracy",
        "val/loss_corrected",
        "val/accuracy_corrected",
        "val/constant_loss",
        "val/constant_accuracy",
    },
    "gold": {"val/loss", "val/accuracy"},
    "answer": {"val/loss", "val/exact_match", "val/f1"},
}


def file(folder: Path, split: str) -> str:
    """The split's file, plain or gzipped."""
    return str(next(folder.glob(f"{split}.jsonl*")))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "demo"])
def test_task(name: str, shared: Path, tiny_folder: str, tmp_path: Path) -> None:
    """Three steps move the weights; the figures and predictions are those of the task's kind."""
    folder = shared / name
    data = TaskDataModule(
        name, file(folder, "train"), file(folder, "validation"), batch_size=4, eval_batch_size=4, num_train=12, num_validation=6,
        calibration_rows=6, max_length=512,
    )  # fmt: skip
    module = ZOFinetuneModule(
        tiny_folder, "float32", sampler=RademacherSampler(), optimizer=lambda *parts: ZOOptimizer(*parts, lr=1e-3, eps=1e-2)
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, default_root_dir=tmp_path, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    assert module.zo_optimizer.forwards == 6
    assert module.zo_optimizer.skipped == 0
    (figures,) = trainer.validate(module, data, verbose=False)[:1]
    assert {key.split("/dataloader")[0] for key in figures} >= FIGURES[data.objective]
    predictions = [row for batch in trainer.predict(module, data) for row in batch]
    assert [row["index"] for row in predictions] == list(range(6))
    if data.objective == "answer":
        assert all(isinstance(row["prediction"], str) and row["answers"] for row in predictions)
    else:
        assert all(row["text"] == data.test_examples[row["index"]].candidates[row["prediction"]].strip() for row in predictions)

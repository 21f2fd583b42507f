"""``metrics.csv``: one file, one row a step, whole at any time, continued by a resumed run."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import film_data, make_module, make_trainer

from zolightning.callbacks import RunLogger, RunReport


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_and_columns(tmp_path: Path) -> None:
    """Figures of one step share a row; new columns widen the file; tensors become numbers; the epoch is left out."""
    logger = RunLogger(str(tmp_path))
    logger.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 3}, step=1)
    logger.log_metrics({"train/lr": 0.25}, step=1)
    logger.log_metrics({"val/loss": 0.75}, step=2)
    assert not logger.path.exists(), "nothing is written before save"
    logger.write()
    assert read(logger.path) == [
        {"step": "1", "train/loss": "0.5", "train/lr": "0.25", "val/loss": ""},
        {"step": "2", "train/loss": "", "train/lr": "", "val/loss": "0.75"},
    ]
    assert logger.rows() == [{"step": "1", "train/loss": "0.5", "train/lr": "0.25"}, {"step": "2", "val/loss": "0.75"}]
    assert (logger.name, logger.version, logger.log_dir, logger.save_dir) == ("", "", str(tmp_path), str(tmp_path))


def filled(folder: Path, steps: int) -> None:
    """A file of an earlier run."""
    logger = RunLogger(str(folder))
    for step in range(1, steps + 1):
        logger.log_metrics({"a": float(step)}, step)
    logger.finalize("success")


def test_resume_keeps_earlier_rows(tmp_path: Path) -> None:
    """Up to the step of the checkpoint; what the interrupted run wrote after it is replaced."""
    filled(tmp_path, 6)
    logger = RunLogger(str(tmp_path))
    logger.start_at(4)
    logger.log_metrics({"a": 50.0, "b": 1.0}, 5)
    logger.write()
    assert [(row["step"], row["a"], row["b"]) for row in read(logger.path)] == [
        *((str(step), float(step).__str__(), "") for step in range(1, 5)),
        ("5", "50.0", "1.0"),
    ]


def test_fresh_start_replaces(tmp_path: Path) -> None:
    filled(tmp_path, 6)
    logger = RunLogger(str(tmp_path))
    logger.start_at(0)
    logger.log_metrics({"b": 1.0}, 0)
    assert len(read(logger.path)) == 6, "not before there is something to write"
    logger.write()
    assert read(logger.path) == [{"step": "0", "b": "1.0"}]


def test_no_figures_no_file(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    logger = RunLogger(str(tmp_path))
    logger.finalize("failed")
    assert len(read(logger.path)) == 2


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, 2)
    logger = RunLogger(str(tmp_path))
    logger.log_metrics({"a": 1.0}, 1)

    def torn(self: Any, rows: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", torn)
    with pytest.raises(KeyboardInterrupt):
        logger.write()
    monkeypatch.undo()
    assert len(read(logger.path)) == 2


def test_through_the_trainer(tiny_folder: str, tmp_path: Path) -> None:
    """A run, its continuation, a validation: earlier rows stay, none is doubled, validation has its own file."""
    data = film_data(tmp_path)
    for steps, ckpt in ((3, None), (6, str(tmp_path / "a.ckpt"))):
        trainer = make_trainer(tmp_path, steps, logger=RunLogger(str(tmp_path)), callbacks=[RunReport()], log_every_n_steps=1)
        trainer.fit(make_module(tiny_folder), data, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    rows = read(tmp_path / "metrics.csv")
    trained = [row["step"] for row in rows if row["train/loss"]]
    assert len(set(trained)) == len(trained)
    forwards = [float(row["train/forwards"]) for row in rows]
    assert forwards == sorted(forwards)
    assert forwards[-1] == 12.0
    losses = [row["train/loss"] for row in rows if row["train/loss"]]
    assert len(losses) == 6
    before = (tmp_path / "metrics.csv").read_bytes()
    trainer = make_trainer(tmp_path, logger=RunLogger(str(tmp_path), "validate.csv"), callbacks=[RunReport()])
    trainer.validate(make_module(tiny_folder), data, verbose=False)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert "val/loss" in read(tmp_path / "validate.csv")[0]


def test_figures_before_training_stand_at_no_forwards(tiny_folder: str, tmp_path: Path) -> None:
    """The first training step must not share their row."""
    report = RunReport()
    trainer = make_trainer(tmp_path, 2, logger=RunLogger(str(tmp_path)), callbacks=[report], log_every_n_steps=1, val_check_interval=1)
    trainer.fit(make_module(tiny_folder), film_data(tmp_path))
    rows = read(tmp_path / "metrics.csv")
    points = {float(row["train/forwards"]): row["val/loss"] for row in rows if row["val/loss"]}
    assert set(points) == {0.0, 2.0, 4.0}
    assert float(points[0.0]) == pytest.approx(report.before["loss"])
    assert not os.path.exists(tmp_path / "metrics.partial")

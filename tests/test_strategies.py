"""Replicas under Lightning: equal, resumable with another number of processes, and one writer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import state_bits
from ranks import on_ranks
from runs import film_data, make_module, make_trainer

import zolightning as zl
from zolightning.callbacks import PredictionWriter, RunCheckpoint, RunLogger, RunReport


def fit(folder: Path, tiny: str, world: int, steps: int, mode: str = "directions", last: bool = False, **options: Any) -> tuple[Any, Any]:
    """A run in this process, one of ``world``; module and Trainer."""
    module = make_module(tiny, estimator=zl.TwoPoint(3), sampler=zl.RademacherSampler(), **options)
    (folder / f"data{os.environ['LOCAL_RANK']}").mkdir(exist_ok=True)
    data = film_data(folder / f"data{os.environ['LOCAL_RANK']}", batch_size=5)
    strategy = zl.ReplicaStrategy(mode=mode, check_every=2, timeout=30)  # type: ignore[arg-type]
    callbacks = [RunCheckpoint(2), RunReport(), PredictionWriter()]
    logger = RunLogger(str(folder))
    trainer = make_trainer(
        folder, steps, devices=world, strategy=strategy, callbacks=callbacks, logger=logger, use_distributed_sampler=True
    )
    trainer.fit(module, data, ckpt_path=str(folder / "checkpoints" / "last.ckpt") if last else None, weights_only=True)
    return module, trainer


def weights(*arguments: Any, **options: Any) -> dict[str, bytes]:
    """What it ends with."""
    return state_bits(fit(*arguments, **options)[0].language_model)


def test_resume_with_another_number(tiny_folder: str, tmp_path: Path) -> None:
    """Two processes for three steps, three for the rest: the bits of one."""
    folders = [tmp_path / name for name in ("one", "many")]
    for folder in folders:
        folder.mkdir()
    (whole,) = on_ranks(1, weights, folders[0], tiny_folder, 1, 6, connect=False)
    half = on_ranks(2, weights, folders[1], tiny_folder, 2, 3, connect=False)
    assert half[0] == half[1] != whole
    rest = on_ranks(3, weights, folders[1], tiny_folder, 3, 6, "directions", True, connect=False)
    assert [type(run) for run in rest] == [dict] * 3, rest
    assert [run == whole for run in rest] == [True] * 3
    checkpoints = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in folders]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    assert sorted(p.name for p in (folders[1] / "checkpoints").iterdir()) == ["last.ckpt"]
    assert (folders[0] / "metrics.csv").read_text().splitlines()[-1] == (folders[1] / "metrics.csv").read_text().splitlines()[-1]


def rows_then_figures(folder: Path, tiny: str) -> tuple[dict[str, bytes], dict[str, float], int]:
    """Weights that start differently on the second process; what it validates and predicts."""
    module = make_module(tiny)
    module.configure_model()
    if os.environ["LOCAL_RANK"] == "1":
        with torch.no_grad():
            next(module.language_model.parameters()).add_(1.0)
    (folder / os.environ["LOCAL_RANK"]).mkdir()
    data = film_data(folder / os.environ["LOCAL_RANK"], batch_size=5)
    trainer = make_trainer(folder, 4, devices=2, strategy=zl.ReplicaStrategy(), callbacks=[PredictionWriter()])
    trainer.fit(module, data)
    (figures,) = trainer.validate(module, data, verbose=False)[:1]
    rows = [row for batch in trainer.predict(module, data) or [] for row in batch]
    return state_bits(module.language_model), figures, len(rows)


def test_rows(tiny_folder: str, tmp_path: Path) -> None:
    """All start with the weights of the first; every process evaluates all rows, one writes."""
    first, second = on_ranks(2, rows_then_figures, tmp_path, tiny_folder, connect=False)
    assert first == second
    module, data = make_module(tiny_folder), film_data(tmp_path, batch_size=5)
    make_trainer(tmp_path, 4).fit(module, data)
    (figures,) = make_trainer(tmp_path).validate(module, data, verbose=False)[:1]
    assert first[1] == pytest.approx(figures, rel=1e-4)
    assert first[2] == len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 40
    for name, tensor in module.language_model.state_dict().items():
        other = torch.frombuffer(bytearray(first[0][name]), dtype=torch.float32).view_as(tensor) if name in first[0] else tensor
        torch.testing.assert_close(tensor, other, rtol=0, atol=2e-5)


class TestRefused:
    def test_other_strategies(self, tiny_folder: str) -> None:
        trainer = make_trainer(Path("."), devices=2, strategy="ddp")
        message = "2 processes under DDPStrategy know nothing of forward-only steps: set trainer.strategy=zolightning.ReplicaStrategy"
        with pytest.raises(ValueError, match=message):
            make_module(tiny_folder).check_trainer(trainer)

    def test_meta_training(self, tiny_folder: str) -> None:
        trainer = make_trainer(Path("."), devices=2, strategy=zl.ReplicaStrategy())
        make_module(tiny_folder).check_trainer(trainer)
        with pytest.raises(ValueError, match=r"PolicyMetaTrainModule uses one device, trainer\.devices asks for 2: set trainer\.devices=1"):
            zl.PolicyMetaTrainModule(tiny_folder).check_trainer(trainer)

    def test_arguments(self) -> None:
        with pytest.raises(ValueError, match="timeout=0 must be positive"):
            zl.ReplicaStrategy(timeout=0)
        with pytest.raises(ValueError, match="mode='both' must be"):
            zl.ReplicaStrategy(mode="both")  # type: ignore[arg-type]

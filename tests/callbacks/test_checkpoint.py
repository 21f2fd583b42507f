"""``last.ckpt``: at intervals and at the end, whole or not at all, never in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from runs import film_data, make_module, make_trainer

from zolightning.callbacks import RunCheckpoint


def step_of(path: Path) -> int:
    """The step that a checkpoint stands at; nothing but data is unpickled."""
    return int(torch.load(path, weights_only=True)["global_step"])


class Look(pl.Callback):
    """Notes which step ``last.ckpt`` stands at after every step."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, {}  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self.seen[trainer.global_step] = step_of(self.path) if self.path.exists() else None


def fit(folder: Path, tiny: str, steps: int, every: int = 500, ckpt: str | None = None, **options: Any) -> Look:
    """A run; what was there before each step."""
    look = Look(folder / "checkpoints" / "last.ckpt")
    trainer = make_trainer(folder, steps, callbacks=[look, RunCheckpoint(every)], **options)
    trainer.fit(make_module(tiny), film_data(folder), ckpt_path=ckpt)
    return look


@pytest.mark.parametrize("steps", [1, 3])
def test_small_max_steps(steps: int, tiny_folder: str, tmp_path: Path) -> None:
    """One at the end, however early that is."""
    look = fit(tmp_path, tiny_folder, steps)
    assert set(look.seen.values()) == {None}
    assert step_of(look.path) == steps
    assert sorted(p.name for p in look.path.parent.iterdir()) == ["last.ckpt"]


def test_at_intervals(tiny_folder: str, tmp_path: Path) -> None:
    look = fit(tmp_path, tiny_folder, 5, every=2)
    assert look.seen == {0: None, 1: None, 2: 2, 3: 2, 4: 4}
    assert step_of(look.path) == 5
    assert sorted(p.name for p in look.path.parent.iterdir()) == ["last.ckpt"]


def test_resumed_run_keeps_it_until_the_next_one(tiny_folder: str, tmp_path: Path) -> None:
    fit(tmp_path, tiny_folder, 2)
    look = fit(tmp_path, tiny_folder, 5, every=2, ckpt=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert look.seen == {2: 2, 3: 2, 4: 4}
    assert sorted(p.name for p in look.path.parent.iterdir()) == ["last.ckpt"]


def test_fresh_start_sets_the_old_one_aside(tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, tiny_folder, 3)
    assert "run before" not in capsys.readouterr().out
    look = fit(tmp_path, tiny_folder, 2)
    assert look.seen == {0: 3, 1: None}, "an interrupted run must not be continued from the checkpoint of another"
    assert (step_of(look.path), step_of(look.path.with_name("previous.ckpt"))) == (2, 3)
    assert [step_of(fit(tmp_path, tiny_folder, 1).path.with_name(f"previous{n}.ckpt")) for n in ("-2", "-3")] == [2, 1], "nothing is lost"
    assert capsys.readouterr().out.count(f"the checkpoint of the run before is now {look.path.with_name('previous.ckpt')}") == 1


def test_a_refused_run_leaves_it(tiny_folder: str, tmp_path: Path) -> None:
    """Also when the set-up probe refuses it."""
    look = fit(tmp_path, tiny_folder, 3)
    trainer = make_trainer(tmp_path, 5, callbacks=[RunCheckpoint()])
    with pytest.raises(ValueError, match="eps=1e-12 is below"):
        trainer.fit(make_module(tiny_folder, eps=1e-12), film_data(tmp_path))
    assert step_of(look.path) == 3


def test_fast_dev_run_writes_nothing(tiny_folder: str, tmp_path: Path) -> None:
    look = fit(tmp_path, tiny_folder, 3)
    fit(tmp_path, tiny_folder, 1, fast_dev_run=True)
    assert step_of(look.path) == 3
    assert sorted(p.name for p in look.path.parent.iterdir()) == ["last.ckpt"]


def test_validation_writes_nothing(tiny_folder: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[RunCheckpoint()])
    trainer.validate(make_module(tiny_folder), film_data(tmp_path), verbose=False)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_a_torn_write_leaves_the_old_one(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up in the middle of the second write."""
    look, real = Look(tmp_path / "checkpoints" / "last.ckpt"), pl.Trainer.save_checkpoint

    def full(self: pl.Trainer, path: Any, *arguments: Any) -> None:
        if self.global_step == 4:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(self, path, *arguments)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    trainer = make_trainer(tmp_path, 6, callbacks=[look, RunCheckpoint(2)])
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(make_module(tiny_folder), film_data(tmp_path))
    assert step_of(look.path) == 2
    assert [p.name for p in look.path.parent.iterdir()] == ["last.ckpt"], "half a file would only fill the disk"


def test_beside_a_users_own(tiny_folder: str, tmp_path: Path) -> None:
    """Lightning's best-of-k works next to it, and neither removes the other's files."""
    best = pl.callbacks.ModelCheckpoint(tmp_path / "best", "{step}", monitor="val/loss", save_top_k=1)
    trainer = make_trainer(tmp_path, 4, callbacks=[RunCheckpoint(), best], val_check_interval=2)
    trainer.fit(make_module(tiny_folder), film_data(tmp_path))
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 4
    assert [p.name for p in (tmp_path / "best").iterdir()] == [Path(best.best_model_path).name]
    assert step_of(Path(best.best_model_path)) in (2, 4)


def test_last_by_lightnings_own_word(tiny_folder: str, tmp_path: Path) -> None:
    """``trainer.fit(ckpt_path="last")`` in Python finds it."""
    fit(tmp_path, tiny_folder, 2)
    look = fit(tmp_path, tiny_folder, 3, ckpt="last")
    assert list(look.seen) == [2]

"""The journal of a Lightning run: continued from wherever it ends, to the same bits."""

from __future__ import annotations

import math
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from nets import Net, net_closure, state_bits
from runs import film_data, make_module, make_trainer

import zolightning as zl
from zolightning.callbacks import Divergence, RunCheckpoint, RunJournal
from zolightning.journal import Back, Recorder, read
from zolightning.policies import PertNN

Bits = dict[str, bytes]


class Stop(pl.Callback):
    """Ends training after some step as a crash would: with an exception that nobody expects, or with a signal."""

    def __init__(self, step: int, how: Any = None) -> None:
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            if self.how is not None:
                os.kill(os.getpid(), self.how)
            else:
                raise KeyError("a bug")


class Counting(zl.CandidateCrossEntropy):
    """Counts how often the loss is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def rows(self, model: Any, batch: Any) -> Any:
        self.count += 1
        return super().rows(model, batch)


def fit(
    folder: Path, tiny: str, steps: int, resume: bool = False, ckpt: str | None = None, every: int = 500, more: Any = (), **options: Any
) -> tuple[Bits, Counting]:
    """A run with a schedule; the trained bits, and the evaluations that they cost."""
    folder.mkdir(exist_ok=True)
    objective = Counting()
    schedule = partial(torch.optim.lr_scheduler.LinearLR, total_iters=20)
    module = make_module(tiny, objective=objective, lr_scheduler=schedule, **{"dtype": "bfloat16", "lr": 1e-2, **options})
    callbacks = [*more, RunJournal(resume), RunCheckpoint(every)]
    trainer = make_trainer(folder, steps, callbacks=callbacks, log_every_n_steps=3, limit_val_batches=0)
    trainer.fit(module, film_data(folder), ckpt_path=ckpt)
    assert (module.zo_optimizer.steps, module.forwards) == (steps, 2 * steps)
    return state_bits(module.language_model), objective


def crash(folder: Path, tiny: str, step: int, **options: Any) -> None:
    """A run that dies after some step."""
    with pytest.raises(KeyError, match="a bug"):
        fit(folder, tiny, 20, more=[Stop(step)], **options)


def last(folder: Path) -> str:
    return str(folder / "checkpoints" / "last.ckpt")


def policy() -> zl.PolicySampler:
    return zl.PolicySampler(PertNN(), refresh_every=4)


@pytest.mark.parametrize("sampler", [zl.GaussianSampler, zl.RademacherSampler, policy], ids=["gaussian", "rademacher", "policy"])
def test_from_the_journal_alone(sampler: Any, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No checkpoint was written yet: eleven steps cost no forward, and no bit differs."""
    whole, every = fit(tmp_path / "whole", tiny_folder, 15, sampler=sampler())
    crash(tmp_path, tiny_folder, 11, sampler=sampler())
    assert "stopped at step 11; --ckpt_path last goes on from there" in capsys.readouterr().out
    assert read(tmp_path / "journal.zo").steps == 11
    again, rest = fit(tmp_path, tiny_folder, 15, resume=True, sampler=sampler())
    assert "journal      steps 0 to 11 are taken from it, without forwards" in capsys.readouterr().out
    assert again == whole
    assert every.count - rest.count == 22
    assert read(tmp_path / "journal.zo").steps == 15


@pytest.mark.parametrize("sampler", [zl.GaussianSampler, policy], ids=["gaussian", "policy"])
def test_from_checkpoint_and_journal(sampler: Any, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice: a checkpoint that is written while steps are taken from the journal stands at its own step."""
    whole, _ = fit(tmp_path / "whole", tiny_folder, 16, sampler=sampler())
    crash(tmp_path, tiny_folder, 11, every=4, sampler=sampler())
    capsys.readouterr()
    crash(tmp_path, tiny_folder, 10, every=3, sampler=sampler(), resume=True, ckpt=last(tmp_path))
    assert "steps 8 to 11 are taken" in capsys.readouterr().out
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 9
    assert read(tmp_path / "journal.zo").steps == 11, "nothing that was written is lost"
    again, _ = fit(tmp_path, tiny_folder, 16, sampler=sampler(), resume=True, ckpt=last(tmp_path))
    assert "steps 9 to 11 are taken" in capsys.readouterr().out
    assert again == whole
    model = make_module(tiny_folder, dtype="bfloat16")
    model.configure_model()
    zl.replay(tmp_path / "journal.zo", model.language_model)
    assert state_bits(model.language_model) == whole


def test_a_checkpoint_by_name_drops_what_follows(tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps with another rate replace those of the journal, also in the middle of a frame."""
    crash(tmp_path, tiny_folder, 11, every=8)
    crash(tmp_path, tiny_folder, 10, every=7, resume=True)  # now the checkpoint is of step 7, inside of a frame
    capsys.readouterr()
    trained, _ = fit(tmp_path, tiny_folder, 13, ckpt=last(tmp_path), lr=5e-3)
    assert "journal      the steps after step 7 will be replaced" in capsys.readouterr().out
    journal = read(tmp_path / "journal.zo")
    assert journal.steps == 13
    assert [entry.row.lr for entry in journal.entries[6:8]] == pytest.approx(
        [1e-2 * (1 / 3 + 2 / 3 * 6 / 20), 5e-3 * (1 / 3 + 2 / 3 * 7 / 20)]
    )
    module = make_module(tiny_folder, dtype="bfloat16")
    module.configure_model()
    zl.replay(tmp_path / "journal.zo", module.language_model)
    assert state_bits(module.language_model) == trained


def test_without_its_journal(tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint suffices; the new journal says where it begins."""
    whole, _ = fit(tmp_path / "whole", tiny_folder, 12)
    crash(tmp_path, tiny_folder, 9, every=6)
    (tmp_path / "journal.zo").unlink()
    capsys.readouterr()
    again, _ = fit(tmp_path, tiny_folder, 12, resume=True, ckpt=last(tmp_path))
    assert "journal      none of this checkpoint: a new one begins at step 6" in capsys.readouterr().out
    assert again == whole
    assert (read(tmp_path / "journal.zo").first.start, read(tmp_path / "journal.zo").steps) == (6, 12)


def test_the_journal_of_another_run(tiny_folder: str, tmp_path: Path) -> None:
    """A checkpoint does not go on with it; it is set aside."""
    fit(tmp_path / "a", tiny_folder, 6)
    fit(tmp_path / "b", tiny_folder, 9, seed=5)
    other = (tmp_path / "b" / "journal.zo").read_bytes()
    fit(tmp_path / "b", tiny_folder, 8, resume=True, ckpt=last(tmp_path / "a"))
    assert read(tmp_path / "b" / "journal.zo").first.start == 6
    assert (tmp_path / "b" / "previous.zo").read_bytes() == other
    fit(tmp_path / "b", tiny_folder, 3)
    assert [read(tmp_path / "b" / name).steps for name in ("previous-2.zo", "journal.zo")] == [8, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1}, "with seed=0, this run has 1"), ({"sampler": zl.RademacherSampler()}, "with noise=gaussian, this run has rademacher"),
     ({"dtype": "float32"}, "is of another model or space")],
)  # fmt: skip
def test_other_settings(change: dict[str, Any], message: str, tiny_folder: str, tmp_path: Path) -> None:
    crash(tmp_path, tiny_folder, 5)
    before = (tmp_path / "journal.zo").read_bytes()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, tiny_folder, 9, resume=True, **change)
    assert (tmp_path / "journal.zo").read_bytes() == before


def test_other_noise_from_a_checkpoint_on(tiny_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is allowed, and said."""
    fit(tmp_path, tiny_folder, 3)
    fit(tmp_path, tiny_folder, 5, resume=True, ckpt=last(tmp_path))
    assert "so far" not in caplog.text
    fit(tmp_path, tiny_folder, 7, resume=True, ckpt=last(tmp_path), sampler=zl.RademacherSampler())
    assert "noise=rademacher instead of the run's gaussian so far" in caplog.text


def test_a_damaged_journal_stops_the_run(tiny_folder: str, tmp_path: Path) -> None:
    crash(tmp_path, tiny_folder, 11)
    data = bytearray((tmp_path / "journal.zo").read_bytes())
    data[-150] ^= 4
    (tmp_path / "journal.zo").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged at byte [\d,]+, after \d+ whole steps"):
        fit(tmp_path, tiny_folder, 15, resume=True)
    assert (tmp_path / "journal.zo").read_bytes() == data


def test_a_refused_run_leaves_it(tiny_folder: str, tmp_path: Path) -> None:
    fit(tmp_path, tiny_folder, 3)
    before = (tmp_path / "journal.zo").read_bytes()
    with pytest.raises(ValueError, match="eps=1e-12 is below"):
        fit(tmp_path, tiny_folder, 5, eps=1e-12)
    fit(tmp_path, tiny_folder, 3, resume=True, ckpt=last(tmp_path))
    assert (tmp_path / "journal.zo").read_bytes() == before


def test_sigterm(tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning finishes the step and leaves; nothing is lost."""
    whole, _ = fit(tmp_path / "whole", tiny_folder, 9)
    with pytest.raises(SystemExit):
        fit(tmp_path, tiny_folder, 9, more=[Stop(5, signal.SIGTERM)])
    assert "stopped at step 5; --ckpt_path last goes on from there" in capsys.readouterr().out
    assert read(tmp_path / "journal.zo").steps == 5
    assert fit(tmp_path, tiny_folder, 9, resume=True)[0] == whole


def test_a_full_disk(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the journal is written: the error is the disk's own, and what was there is whole."""
    real, writes = os.write, []

    def full(file: int, data: Any) -> int:
        writes.append(len(data))
        if len(writes) > 4:  # the head of the file, the first step, two log lines
            raise OSError(28, "No space left on device")
        return real(file, data)

    whole, _ = fit(tmp_path / "whole", tiny_folder, 9)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            fit(tmp_path, tiny_folder, 9)
    assert read(tmp_path / "journal.zo").steps == 6
    assert fit(tmp_path, tiny_folder, 9, resume=True)[0] == whole


def test_other_modules_have_none(tmp_path: Path) -> None:
    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = make_trainer(tmp_path, 2, callbacks=[RunJournal()])
    trainer.fit(Plain(), torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2))
    assert not (tmp_path / "journal.zo").exists()


class TestDivergence:
    def fit(self, folder: Path, tiny: str, steps: int = 24, more: Any = (), resume: bool = False, **options: Any) -> Any:
        """A rate that blows the model up, with a window of four steps."""
        options = {"lr": 0.3, "dtype": "float32", **options}
        divergence = Divergence(window=4, back=4, rise=0.2, factor=0.1)
        return fit(folder, tiny, steps, resume=resume, more=[divergence, *more], every=6, **options)[0]

    def test_back_by_replay_to_a_smaller_rate(self, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trained = self.fit(tmp_path, tiny_folder)
        out = capsys.readouterr().out
        journal = read(tmp_path / "journal.zo")
        assert journal.backs
        step, to, factor = journal.backs[0]
        assert step % 4 == 0
        assert (to, factor) == (max(step - 8, 0), 0.1)
        assert f"at step {step}: back to the weights of step {to}, lr=" in out
        rates = [entry.row.lr for entry in journal.entries]
        assert rates[step] < 0.2 * rates[step - 1]
        module = make_module(tiny_folder)
        module.configure_model()
        zl.replay(tmp_path / "journal.zo", module.language_model)
        assert state_bits(module.language_model) == trained
        assert all(math.isfinite(float(p.float().sum())) for p in module.language_model.parameters())

    @pytest.mark.parametrize("late", [-1, 1, 5])
    def test_resumed_runs_go_back_too(self, late: int, tiny_folder: str, tmp_path: Path) -> None:
        """Crashes just before and some steps after a return, with and without a checkpoint between."""
        whole = self.fit(tmp_path / "whole", tiny_folder)
        at = read(tmp_path / "whole" / "journal.zo").backs[0].step
        with pytest.raises(KeyError):
            self.fit(tmp_path / "a", tiny_folder, more=[Stop(at + late)])
        ckpt = last(tmp_path / "a") if Path(last(tmp_path / "a")).exists() else None
        for folder, checkpoint in ((tmp_path / "a", ckpt),):
            again = self.fit(folder, tiny_folder, resume=True, ckpt=checkpoint)
            assert again == whole
            assert read(folder / "journal.zo").backs == read(tmp_path / "whole" / "journal.zo").backs

    def test_from_the_journal_alone(self, tiny_folder: str, tmp_path: Path) -> None:
        whole = self.fit(tmp_path, tiny_folder)
        (tmp_path / "checkpoints" / "last.ckpt").unlink()
        assert self.fit(tmp_path, tiny_folder, resume=True) == whole

    @pytest.mark.parametrize(
        ("losses", "reason"),
        [
            ([1.0] * 8, ""),
            ([1.0] * 4, ""),
            ([1.0] * 3, ""),
            ([1.0, 1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5], ""),
            ([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.1], "the loss has risen from 1.000 to 2.025"),
            ([1.0, 1.0, 1.0, 1.0, math.nan, 1.0, math.nan, 1.0], ""),
            ([math.nan, 1.0, math.nan, math.nan], "3 of 4 losses are not finite"),
            ([], ""),
        ],
    )
    def test_reasons(self, losses: list[float], reason: str) -> None:
        assert Divergence(window=4, rise=1.0)._reason(losses) == reason

    def test_too_many_returns(self, tiny_folder: str, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"after 1 returns to earlier weights: lower the learning rate"):
            fit(tmp_path, tiny_folder, 30, more=[Divergence(window=2, back=2, rise=0.0, factor=0.99, limit=1)], lr=0.5, dtype="float32")

    def test_needs_a_journal(self, tiny_folder: str, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, 2, callbacks=[Divergence()])
        with pytest.raises(ValueError, match=r"add zolightning.callbacks.RunJournal"):
            trainer.fit(make_module(tiny_folder), film_data(tmp_path))

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"window": 0}, "window=0 must be at least 1"), ({"factor": 1.0}, "factor=1.0 must be between 0 and 1"), ({"back": -1}, "back=-1"),
         ({"rise": -1.0}, "rise=-1.0 must not be"), ({"skipped": math.nan}, "skipped=nan must not be"), ({"limit": 0}, "limit=0")],
    )  # fmt: skip
    def test_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Divergence(**options)


@pytest.mark.parametrize("now", [{"sampler": zl.RademacherSampler()}, {"rule": zl.SGD(weight_decay=0.5)}], ids=["noise", "rule"])
def test_a_return_moves_by_the_settings_of_each_step(now: dict[str, Any], tmp_path: Path) -> None:
    """A run that was resumed with another noise or rule goes back to steps before that."""
    path, first = tmp_path / "journal.zo", Net(torch.float32).eval()
    optimizer = zl.ZOOptimizer(zl.DenseSpace(first), lr=0.02, eps=0.1)
    recorder = Recorder(path, optimizer)
    wanted: Bits = {}
    for step in range(9):
        wanted = state_bits(first) if step == 5 else wanted
        optimizer.step(net_closure(first, step))
    recorder.drain()
    recorder.close()
    model = Net(torch.float32).eval()
    model.load_state_dict(first.state_dict())
    resumed = zl.ZOOptimizer(zl.DenseSpace(model), lr=0.02, eps=0.1, **now)
    resumed.param_groups[0].update(step=9, forwards=18)
    callback = RunJournal()
    callback.recorder = Recorder(path, resumed, earlier=read(path))
    for step in range(9, 12):
        resumed.step(net_closure(model, step))
    base = Net(torch.float32).state_dict()
    module: Any = SimpleNamespace(
        space=resumed.space, zo_optimizer=resumed, scale_lr=lambda factor: None, reload_base=lambda: model.load_state_dict(base)
    )
    callback.go_back(module, Back(12, 5, 0.5))
    assert state_bits(model) == wanted

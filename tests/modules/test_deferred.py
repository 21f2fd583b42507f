"""Deferred updates in a Lightning run: nobody but a probe sees weights that lack them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from nets import bits
from runs import QUESTIONS, film_data, make_module, make_trainer
from torch import Tensor

import zolightning as zl
from zolightning.callbacks import RunJournal


class Failing(zl.CandidateCrossEntropy):
    """Fails in the seventh step."""

    calls = 0

    def rows(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls == 14:
            raise ArithmeticError("broken")
        return super().rows(model, batch)


def fit(pretrained: str, folder: Path, deferred: bool, steps: int = 9, callbacks: Any = (), **options: Any) -> zl.ZOFinetuneModule:
    folder.mkdir(exist_ok=True)
    module = make_module(pretrained, sampler=zl.LowRankSampler(2, 5), deferred_updates=deferred, **options)
    trainer = make_trainer(
        folder, steps, callbacks=list(callbacks), val_check_interval=3, check_val_every_n_epoch=None, limit_val_batches=1
    )
    trainer.fit(module, film_data(folder))
    return module


def test_the_weights_are_the_same(tiny_folder: str, tmp_path: Path) -> None:
    one, two = (fit(tiny_folder, tmp_path / str(deferred), deferred) for deferred in (False, True))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    base = make_module(tiny_folder)
    base.configure_model()
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), two.parameters(), strict=True))


def test_validation_and_checkpoints_see_all_moves(tiny_folder: str, tmp_path: Path) -> None:
    """The state of a validation, and what ``state_dict()`` gives between two steps, are those of a run that defers nothing."""

    class Look(zl.ZOFinetuneModule):
        def on_validation_epoch_start(self) -> None:
            super().on_validation_epoch_start()
            self.seen.append([p.detach().clone() for p in self.parameters()])

        def on_train_batch_end(self, *arguments: Any) -> None:
            if self.trainer.global_step == 7:
                self.seen.append(list(self.state_dict().values()))

        @property
        def seen(self) -> list[list[Tensor]]:
            return self.__dict__.setdefault("_seen", [])

    one, two = (fit(tiny_folder, tmp_path / str(deferred), deferred, kind=Look).seen for deferred in (False, True))
    assert len(one) == len(two) == 4
    for there, here in zip(one, two, strict=True):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(there[:20], here[:20], strict=True))


def test_after_an_error(tiny_folder: str, tmp_path: Path) -> None:
    """The weights have all six steps that were taken."""
    found = []
    for deferred in (False, True):
        module = make_module(tiny_folder, sampler=zl.LowRankSampler(2, 5), deferred_updates=deferred, objective=Failing())
        with pytest.raises(ArithmeticError):
            make_trainer(tmp_path, 9).fit(module, film_data(tmp_path))
        found.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(*found, strict=True))


def test_a_strange_callback_may_look(tiny_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Watcher(pl.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            pass

    module = fit(tiny_folder, tmp_path, True, 1, [Watcher()])
    assert not module.deferred_updates
    assert "deferred_updates: no, Watcher may look at the weights after every step" in caplog.text


def test_resume_has_the_same_bits(tiny_folder: str, tmp_path: Path) -> None:
    """From a checkpoint inside a window, and from the journal beyond it; the journal rebuilds the weights."""
    save = partial(pl.callbacks.ModelCheckpoint, dirpath=tmp_path / "ckpt", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = fit(tiny_folder, tmp_path / "whole", True, 12, [save(), RunJournal()], dtype="bfloat16")
    options = {"sampler": zl.LowRankSampler(2, 5), "deferred_updates": True, "dtype": "bfloat16"}
    module = make_module(tiny_folder, **options)
    trainer = make_trainer(
        tmp_path / "whole", 12, callbacks=[RunJournal(), save(dirpath=tmp_path / "again")], val_check_interval=3,
        check_val_every_n_epoch=None, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(module, film_data(tmp_path), ckpt_path=tmp_path / "ckpt" / "step=3.ckpt", weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), module.parameters(), strict=True))
    fresh = make_module(tiny_folder, dtype="bfloat16")
    fresh.configure_model()
    zl.replay(tmp_path / "whole" / "journal.zo", fresh.language_model)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fresh.parameters(), strict=True))


def test_after_an_error_between_steps(tiny_folder: str, tmp_path: Path) -> None:
    """Without any callback of ours."""

    class Stops(zl.ZOFinetuneModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 6:
                raise KeyboardInterrupt

    found = []
    for deferred in (False, True):
        module = make_module(tiny_folder, kind=Stops, sampler=zl.LowRankSampler(2, 50), deferred_updates=deferred)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            make_trainer(tmp_path, 9).fit(module, film_data(tmp_path))
        found.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("as_captured")
@pytest.mark.parametrize("sampler", [zl.GaussianSampler, lambda: zl.PolicySampler(zl.policies.PertNN(), refresh_every=4)])
def test_dense_moves_wait_without_a_trace(sampler: Any, tiny_folder: str, tmp_path: Path) -> None:
    """Validation, checkpoints, weights and the journal are, to the last bit, those of a run that defers nothing; in two halves too."""

    class Look(zl.ZOFinetuneModule):
        def on_validation_epoch_start(self) -> None:
            super().on_validation_epoch_start()
            seen.append([bits(p) for p in self.parameters()])

    def fit(deferred: bool, steps: int, **options: Any) -> zl.ZOFinetuneModule:
        module = make_module(tiny_folder, kind=Look, sampler=sampler(), deferred_updates=deferred, dtype="bfloat16")
        save = pl.callbacks.ModelCheckpoint(
            dirpath=tmp_path / "ckpt", filename=f"{deferred}-{{step}}", every_n_train_steps=3, save_top_k=-1
        )
        every = {"val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 1}
        folder = tmp_path / str(deferred)
        folder.mkdir(exist_ok=True)
        make_trainer(folder, steps, callbacks=[save, RunJournal(resume=bool(options))], **every).fit(module, film_data(folder), **options)
        return module

    results = []
    for deferred in (False, True):
        seen: list[list[bytes]] = []
        fit(deferred, 8)
        late = fit(deferred, 12, ckpt_path=tmp_path / "ckpt" / f"{deferred}-step=3.ckpt", weights_only=False)
        seen.append([bits(p) for p in late.parameters()])
        results.append((seen, (tmp_path / str(deferred) / "journal.zo").read_bytes()))
    assert late.space._late is not None
    assert len(results[0][0]) > 4
    assert results[0] == results[1]


def test_text_is_generated_along_low_rank_directions(tiny_folder: str, tmp_path: Path) -> None:
    """A tied model, whose matrix is looked up and multiplied with inside one probe."""
    module = make_module(tiny_folder, sampler=zl.LowRankSampler(2, 5), objective=zl.Reward("f1", max_new_tokens=2))
    make_trainer(tmp_path, 2).fit(module, film_data(tmp_path, "squad", QUESTIONS))
    assert module.steps == 2

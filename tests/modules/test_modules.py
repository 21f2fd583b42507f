"""The module through the Trainer, in Python, without the command: data of any kind, checkpoints, calibration, resuming."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from nets import state_bits
from runs import FILMS, QUESTIONS, film_data, make_module, make_trainer
from torch.utils.data import DataLoader

import zolightning as zl
from zolightning.callbacks import RunReport
from zolightning.objectives import CandidateCrossEntropy, fit_biases

COPA = [
    {"premise": "It rained.", "choice1": "I got wet.", "choice2": "The sun shone.", "question": "effect", "label": 0},
    {"premise": "He fell.", "choice1": "He flew.", "choice2": "It was icy.", "question": "cause", "label": 1},
] * 4


def token_loader(count: int = 8, batch_size: int = 4) -> DataLoader[Any]:
    """Random token sequences, the last three tokens to be learnt."""
    ids = torch.randint(3, 200, (count, 9), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "scored": torch.tensor(3)} for row in ids]
    return DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]


def saved(trainer: pl.Trainer, path: Path) -> dict[str, Any]:
    """The state of a run, through a file that holds nothing but data."""
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


class TestWithoutTheCommand:
    def test_fit_validate_test_predict(self, tiny_folder: str, tmp_path: Path) -> None:
        module, data = make_module(tiny_folder), film_data(tmp_path)
        trainer = make_trainer(tmp_path, val_check_interval=4)
        trainer.fit(module, data)
        assert trainer.global_step == 4
        assert module.zo_optimizer.forwards == 8
        assert not module.language_model.training
        fitted = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert {"train/loss", "train/coefficient", "train/lr", "train/forwards", "val/loss", "val/accuracy_corrected"} <= fitted.keys()
        (validated,) = make_trainer(tmp_path).validate(module, data, verbose=False)[:1]
        (tested,) = make_trainer(tmp_path).test(module, data, verbose=False)[:1]
        assert validated["val/loss"] == pytest.approx(fitted["val/loss"])
        assert {name.removeprefix("val/"): value for name, value in validated.items()} == pytest.approx(
            {name.removeprefix("test/"): value for name, value in tested.items()}
        )
        rows = [row for batch in make_trainer(tmp_path).predict(module, data) or [] for row in batch]
        assert [row["index"] for row in rows] == list(range(len(FILMS)))
        accuracy = sum(row["prediction"] == row["label"] for row in rows) / len(rows)
        assert accuracy == pytest.approx(validated["val/accuracy"])

    def test_equals_the_optimizer_in_a_plain_loop(self, tiny_folder: str, tmp_path: Path) -> None:
        module, data = make_module(tiny_folder, sampler=zl.RademacherSampler()), film_data(tmp_path)
        make_trainer(tmp_path).fit(module, data)
        other = make_module(tiny_folder)
        other.configure_model()
        model = other.language_model.eval()
        optimizer = zl.ZOOptimizer(zl.DenseSpace(model), zl.RademacherSampler(), lr=1e-3, eps=1e-2)
        for step in range(4):
            optimizer.step(zl.CandidateCrossEntropy().on(model, data.train_batch(step)))
        assert state_bits(module.language_model) == state_bits(model)

    def test_plain_dataloader(self, tiny_folder: str, tmp_path: Path) -> None:
        """Token sequences: no data module, no task, no tokenizer."""
        module, loader = make_module(tiny_folder), token_loader()
        trainer = make_trainer(tmp_path, callbacks=[RunReport()], check_val_every_n_epoch=1)
        trainer.fit(module, loader, loader)
        with torch.no_grad():
            losses = [float(zl.TokenCrossEntropy().on(module.language_model, batch)()) for batch in loader]
        assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(sum(losses) / 2, abs=1e-5)
        assert module.tokenizer is not None
        (figures,) = make_trainer(tmp_path).validate(module, loader, verbose=False)
        assert figures == {"val/loss": pytest.approx(sum(losses) / 2, abs=1e-5)}

    def test_plain_dataloader_with_candidates(self, tiny_folder: str, tmp_path: Path) -> None:
        """Batches that somebody else made, with the objective that fits them."""
        data = film_data(tmp_path, tokenizer=tiny_folder)
        data.setup("fit")
        batches = [data.train_batch(step) for step in range(3)]
        loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        module = make_module(tiny_folder, objective=CandidateCrossEntropy())
        trainer = make_trainer(tmp_path)
        trainer.fit(module, loader, loader)
        with torch.no_grad():
            losses = [float(CandidateCrossEntropy().on(module.language_model, batch)()) for batch in batches]
        (figures,) = make_trainer(tmp_path).validate(module, loader, verbose=False)
        assert figures["val/loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)
        assert "val/accuracy" in figures

    def test_plain_dataloader_with_an_objective_of_ones_own(self, tiny_folder: str, tmp_path: Path) -> None:
        """Its weighted mean over all validation rows is the loss."""

        class LogitPenalty(zl.Objective):
            def rows(self, model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
                weight = torch.arange(1.0, 1 + len(batch["input_ids"]))
                return model(input_ids=batch["input_ids"]).logits.float().square().mean(dim=(1, 2)) * weight, weight

        module, loader = make_module(tiny_folder, objective=LogitPenalty()), token_loader(7)
        make_trainer(tmp_path, 2).fit(module, loader, loader)
        (figures,) = make_trainer(tmp_path).validate(module, loader, verbose=False)
        with torch.no_grad():
            parts = [LogitPenalty().rows(module.language_model, batch) for batch in loader]
        expected = sum(float(loss.sum()) for loss, _ in parts) / sum(float(weight.sum()) for _, weight in parts)
        assert figures == {"val/loss": pytest.approx(expected, rel=1e-5)}

    def test_somebody_elses_data_module(self, tiny_folder: str, tmp_path: Path) -> None:
        """One validation loader instead of a list, and none at all."""

        class Tokens(pl.LightningDataModule):
            def train_dataloader(self) -> Any:
                return token_loader()

        class Both(Tokens):
            def val_dataloader(self) -> Any:
                return token_loader()

        for data in (Both(), Tokens()):
            report, module = RunReport(), make_module(tiny_folder)
            make_trainer(tmp_path, 2, callbacks=[report]).fit(module, data)
            assert report.started
            assert set(report.before) == ({"loss"} if isinstance(data, Both) else set())

    def test_evaluation_obeys_limit_val_batches(self, tiny_folder: str, tmp_path: Path) -> None:
        module, data, report = make_module(tiny_folder), film_data(tmp_path, eval_batch_size=8), RunReport()
        trainer = make_trainer(tmp_path, 1, limit_val_batches=1, val_check_interval=1, callbacks=[report])
        trainer.fit(module, data)
        assert module.evaluate()["loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]))
        none = RunReport()
        make_trainer(tmp_path, 1, limit_val_batches=0, callbacks=[none]).fit(make_module(tiny_folder), data)
        assert none.before == {}

    def test_a_subclass_overrides_training_step(self, tiny_folder: str, tmp_path: Path) -> None:
        """The documented way: one step of the optimizer for each batch."""

        class Mine(zl.ZOFinetuneModule):
            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                def closure() -> torch.Tensor:
                    return self.language_model(input_ids=batch["input_ids"]).logits.float().square().mean()

                loss: torch.Tensor = self.optimizers().step(closure)  # type: ignore[union-attr]
                self.log("train/squares", loss)
                return loss

        module = make_module(tiny_folder, kind=Mine, lr=1e-2)
        trainer = make_trainer(tmp_path, 12)
        losses: list[float] = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                losses.append(float(trainer.callback_metrics["train/squares"]))

        trainer.callbacks.append(Watch())  # type: ignore[attr-defined]
        trainer.fit(module, token_loader(4))
        assert (trainer.global_step, module.zo_optimizer.steps) == (12, 12)
        assert losses[-1] < losses[0]

    def test_parameters_of_a_subclass_are_in_the_checkpoint(self, tiny_folder: str, tmp_path: Path) -> None:
        class Mine(zl.ZOFinetuneModule):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                self.register_buffer("counter", torch.zeros(2))

        module = make_module(tiny_folder, kind=Mine)
        trainer = make_trainer(tmp_path, 1)
        trainer.fit(module, token_loader())
        module.counter += 7  # type: ignore[operator]
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        other: Any = make_module(tiny_folder, kind=Mine)
        make_trainer(tmp_path, 2).fit(other, token_loader(), ckpt_path=str(tmp_path / "a.ckpt"))
        assert other.counter.tolist() == [7.0, 7.0]

    def test_model_before_it_is_loaded(self, tiny_folder: str) -> None:
        with pytest.raises(RuntimeError, match=r"^the model is loaded by configure_model\(\); call it first$"):
            _ = make_module(tiny_folder).language_model

    @pytest.mark.parametrize(("options", "message"), [({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1")])
    def test_bad_argument(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}$"):
            make_module("nowhere", **options)

    def test_micro_batches_change_nothing_but_rounding(self, tiny_folder: str, tmp_path: Path) -> None:
        bits = []
        for size in (None, 3):
            module = make_module(tiny_folder, micro_batch_size=size)
            make_trainer(tmp_path, 2).fit(module, film_data(tmp_path))
            bits.append(torch.cat([p.detach().flatten() for p in module.language_model.parameters()]))
        assert torch.allclose(*bits, atol=1e-4)
        assert not torch.equal(bits[0], torch.cat([p.flatten() for p in _base(tiny_folder).parameters()]))


def _base(folder: str) -> torch.nn.Module:
    module = make_module(folder)
    module.configure_model()
    return module.language_model


class TestRewards:
    def test_figures_of_a_reward_run(self, tiny_folder: str, tmp_path: Path) -> None:
        """The reward is reported beside the task's own figures."""
        objective = zl.Reward("accuracy", predict="choose")
        module, report = make_module(tiny_folder, objective=objective), RunReport()
        trainer = make_trainer(tmp_path, 2, callbacks=[report], val_check_interval=2)
        trainer.fit(module, film_data(tmp_path))
        assert report.before["reward"] == report.before["accuracy"]
        assert float(trainer.callback_metrics["val/reward"]) == pytest.approx(float(trainer.callback_metrics["val/accuracy"]))

    def test_generation(self, tiny_folder: str, tmp_path: Path) -> None:
        module = make_module(tiny_folder, objective=zl.Reward("f1", max_new_tokens=2))
        trainer = make_trainer(tmp_path, 2, val_check_interval=2)
        trainer.fit(module, film_data(tmp_path, "squad", QUESTIONS))
        assert float(trainer.callback_metrics["val/reward"]) == pytest.approx(float(trainer.callback_metrics["val/f1"]))
        assert module.zo_optimizer.forwards == 4

    @pytest.mark.parametrize("objective", [zl.Reward("accuracy", predict="choose"), zl.CandidateCrossEntropy()])
    def test_all_candidates_of_a_gold_task(self, objective: zl.Objective, tiny_folder: str, tmp_path: Path) -> None:
        """COPA's own loss needs the right choice alone; comparing choices needs both, or there is nothing to learn."""
        data = film_data(tmp_path, "copa", COPA)
        module = make_module(tiny_folder, objective=objective)
        make_trainer(tmp_path, 1).fit(module, data)
        assert data.train_batch(0)["input_ids"].shape[0] == 8


class TestCalibration:
    def test_fitted_before_training_and_used(self, tiny_folder: str, tmp_path: Path) -> None:
        """By hand: biases of the base model on the calibration rows; they are in the training loss and in the figures."""
        objective = CandidateCrossEntropy(calibrate=True)
        module, data = make_module(tiny_folder, objective=objective), film_data(tmp_path)
        trainer = make_trainer(tmp_path, 1, val_check_interval=1)
        trainer.fit(module, data)
        assert objective.biases is not None
        model, rows = _base(tiny_folder).eval(), data._split("train").encoded[:16]
        with torch.no_grad():
            scores = zl.objectives.candidate_scores(model, data._collator()(rows))
            expected = fit_biases(scores, torch.tensor([row.label for row in rows]))
            assert torch.allclose(objective.biases.double(), expected, atol=1e-5)
            assert float(expected[1].abs()) > 0.05
            batch = data.train_batch(0)
            losses = []
            space = zl.DenseSpace(model)
            sampler = zl.GaussianSampler()
            sampler.bind(space)
            for sign in (1, -1):
                with space.probe(sampler.directions(0, 0, 1)[0], sign * 1e-2):
                    shifted = zl.objectives.candidate_scores(model, batch) + expected
                losses.append(float(torch.nn.functional.cross_entropy(shifted, batch["label"])))
        assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(losses) / 2, abs=1e-5)
        assert "val/loss_calibrated" in trainer.callback_metrics
        assert float(trainer.callback_metrics["val/loss_calibrated"]) != pytest.approx(
            float(trainer.callback_metrics["val/loss"]), abs=1e-3
        )

    def test_stored_restored_and_used_in_prediction(self, tiny_folder: str, tmp_path: Path) -> None:
        data = film_data(tmp_path)
        first = make_module(tiny_folder, objective=CandidateCrossEntropy(calibrate=True))
        trainer = make_trainer(tmp_path, 2)
        trainer.fit(first, data)
        biases = first.objective.biases  # type: ignore[union-attr]
        stored = saved(trainer, tmp_path / "a.ckpt")["zolightning"]["biases"]
        assert stored == biases.tolist()
        # Calibration rows of the other run are different: the biases must come from the checkpoint.
        again = make_module(tiny_folder, objective=CandidateCrossEntropy(calibrate=True))
        make_trainer(tmp_path, 3).fit(again, film_data(tmp_path, calibration_rows=3), ckpt_path=str(tmp_path / "a.ckpt"))
        assert torch.equal(again.objective.biases, biases)  # type: ignore[union-attr]
        # In prediction they decide.
        huge = torch.load(tmp_path / "a.ckpt", weights_only=True)
        for push, choice in ((50.0, 1), (-50.0, 0)):
            huge["zolightning"]["biases"] = [0.0, push]
            torch.save(huge, tmp_path / "huge.ckpt")
            module = make_module(tiny_folder, objective=CandidateCrossEntropy(calibrate=True))
            rows = make_trainer(tmp_path).predict(module, data, ckpt_path=str(tmp_path / "huge.ckpt"))
            assert rows is not None
            assert {row["prediction"] for batch in rows for row in batch} == {choice}

    def test_needs_rows(self, tiny_folder: str, tmp_path: Path) -> None:
        module = make_module(tiny_folder, objective=CandidateCrossEntropy(calibrate=True))
        with pytest.raises(ValueError, match=r"^candidate biases need training rows to fit on: set data.calibration_rows above 0$"):
            make_trainer(tmp_path).fit(module, film_data(tmp_path, calibration_rows=0))


class TestResume:
    def run(
        self, folder: str, tmp_path: Path, steps: int, ckpt: str | None = None, **options: Any
    ) -> tuple[pl.Trainer, zl.ZOFinetuneModule]:
        """A run up to a step."""
        module, trainer = make_module(folder, **options), make_trainer(tmp_path, steps)
        trainer.fit(module, film_data(tmp_path), ckpt_path=ckpt)
        return trainer, module

    def test_in_a_new_process_of_thought(self, tiny_folder: str, tmp_path: Path) -> None:
        """3 + 4 steps are 7 steps, bit for bit."""
        _, whole = self.run(tiny_folder, tmp_path, 7)
        trainer, _ = self.run(tiny_folder, tmp_path, 3)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        _, rest = self.run(tiny_folder, tmp_path, 7, str(tmp_path / "a.ckpt"))
        assert state_bits(rest.language_model) == state_bits(whole.language_model)
        assert rest.zo_optimizer.forwards == 14

    @pytest.mark.parametrize(
        ("own", "message"),
        [({"lr": 5e-3}, "lr=0.005 instead of the checkpoint's 0.001"), ({"eps": 2e-2}, "eps=0.02 instead of the checkpoint's 0.01"),
         ({"seed": 123456789}, "seed=123456789 instead of the checkpoint's 0")],
    )  # fmt: skip
    def test_own_settings_win_and_say_so(
        self, own: dict[str, Any], message: str, tiny_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer, _ = self.run(tiny_folder, tmp_path, 2)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        with caplog.at_level(logging.WARNING, logger="zolightning"):
            _, module = self.run(tiny_folder, tmp_path, 4, str(tmp_path / "a.ckpt"), **own)
        assert [record.getMessage() for record in caplog.records if record.name == "zolightning"] == [message]
        name, value = next(iter(own.items()))
        assert module.zo_optimizer.param_groups[0][name] == value
        caplog.clear()
        _, unchanged = self.run(tiny_folder, tmp_path, 4, str(tmp_path / "a.ckpt"))
        assert [record for record in caplog.records if record.name == "zolightning"] == []
        assert state_bits(unchanged.language_model) != state_bits(module.language_model)

    @pytest.mark.parametrize(
        "schedule",
        [
            partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=6),
            partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6),
            partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
            partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=6),
            lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
                optimizer,
                [
                    torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
                    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
                ],
                [2],
            ),
        ],
        ids=["linear", "cosine", "lambda", "polynomial", "warm-up"],
    )
    def test_another_rate_with_a_schedule(self, schedule: Any, tiny_folder: str, tmp_path: Path) -> None:
        """The schedule goes on at its place, at the new height."""
        trainer, _ = self.run(tiny_folder, tmp_path, 3, lr_scheduler=schedule)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        _, same = self.run(tiny_folder, tmp_path, 5, str(tmp_path / "a.ckpt"), lr_scheduler=schedule)
        _, other = self.run(tiny_folder, tmp_path, 5, str(tmp_path / "a.ckpt"), lr_scheduler=schedule, lr=4e-3)
        _, whole = self.run(tiny_folder, tmp_path, 5, lr_scheduler=schedule)
        rates = [module.zo_optimizer.param_groups[0]["lr"] for module in (same, other, whole)]
        assert rates[0] == pytest.approx(rates[2])
        assert rates[1] == pytest.approx(4 * rates[0])

    @pytest.mark.parametrize(
        ("own", "message"),
        [
            ({"dtype": "bfloat16"}, r"block 'model.embed_tokens.weight' is float32\[\d+, 32\] there and bfloat16\[\d+, 32\] here"),
            (
                {"space": partial(zl.DenseSpace, include=["*norm*"])},
                "block 'model.embed_tokens.weight' is float32.* there and missing here",
            ),
        ],
    )
    def test_checkpoint_of_another_model(self, own: dict[str, Any], message: str, tiny_folder: str, tmp_path: Path) -> None:
        trainer, _ = self.run(tiny_folder, tmp_path, 1)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=f"a checkpoint of another model or space: {message}"):
            self.run(tiny_folder, tmp_path, 2, str(tmp_path / "a.ckpt"), **own)

    def test_the_checkpoint_holds_what_moves(self, tiny_folder: str, tmp_path: Path) -> None:
        trainer, module = self.run(tiny_folder, tmp_path, 2, space=partial(zl.DenseSpace, include=["*norm*"]))
        state = saved(trainer, tmp_path / "a.ckpt")
        assert list(state["state_dict"]) == [f"model.{block.name}" for block in module.space.blocks]
        assert len(state["state_dict"]) == 5
        assert state["global_step"] == 2
        assert state["zolightning"]["pretrained"] == tiny_folder

"""The command from end to end in this process: resume, validate, test, predict, export, a stranger's data, Lightning's own features."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import QUESTIONS, write_rows

Main = Callable[..., Any]


@pytest.fixture
def small(options: list[str]) -> list[str]:
    """Three steps without validation on the way."""
    return [*options, "--model.dtype=float32", "--trainer.max_steps=3", "--trainer.limit_val_batches=2"]


def rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder: Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


class TestLast:
    def test_none_yet_then_resume_then_complete(
        self, main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        main("fit", *small, "--ckpt_path=last")
        assert capsys.readouterr().out.splitlines()[0] == f"no checkpoint in {run / 'checkpoints'}: starting from step 0"
        assert checkpoint(run)["global_step"] == 3
        cli = main("fit", *small, "--ckpt_path=last", "--trainer.max_steps=5", "--trainer.log_every_n_steps=1")
        out = capsys.readouterr().out
        assert "2 steps to go" in out
        assert "starting from step 0" not in out
        assert cli.model.zo_optimizer.steps == 5
        steps = [int(row["step"]) for row in rows_of(run / "metrics.csv")]
        assert steps == [0, 3, 4, 5]
        files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        main("fit", *small, "--ckpt_path=last", "--trainer.max_steps=5")
        assert capsys.readouterr().out.splitlines() == ["nothing to do: the run is at step 5, trainer.max_steps=5"]
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files, "a complete run touches nothing"

    def test_command_line_wins(self, main: Main, small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Over the rate that the checkpoint's optimizer holds, and says so."""
        main("fit", *small)
        main("fit", *small, "--ckpt_path=last", "--trainer.max_steps=4", "--model.optimizer.lr=0.005")
        assert [record.getMessage() for record in caplog.records] == ["lr=0.005 instead of the checkpoint's 0.0001"]
        assert checkpoint(tmp_path / "run")["optimizer_states"][0]["param_groups"][0]["lr"] == 0.005

    def test_other_rows_are_said(self, main: Main, small: list[str], caplog: pytest.LogCaptureFixture) -> None:
        """Where a run goes on, not where it is evaluated."""
        main("fit", *small)
        main("validate", *small, "--ckpt_path=last", "--data.batch_size=4")
        assert not caplog.records
        main("fit", *small, "--ckpt_path=last", "--trainer.max_steps=4", "--data.batch_size=4")
        expected = "data.batch_size=4 instead of the checkpoint's 8: the coming steps see other rows"
        assert [record.getMessage() for record in caplog.records] == [expected]

    def test_the_estimate_leaves_out_what_the_journal_has(
        self, main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main("fit", *small)
        (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
        capsys.readouterr()
        main("fit", *small, "--ckpt_path=last", "--trainer.max_steps=5")
        assert "2 forwards a step, 2 steps to go, 4 forwards" in capsys.readouterr().out

    def test_fresh_start(self, main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Without --ckpt_path a second run starts anew and replaces the figures."""
        main("fit", *small)
        main("fit", *small, "--trainer.max_steps=2")
        assert checkpoint(tmp_path / "run")["global_step"] == 2
        assert [row["step"] for row in rows_of(tmp_path / "run" / "metrics.csv")] == ["0", "2"]
        assert "the checkpoint of the run before is now" in capsys.readouterr().out

    @pytest.mark.parametrize("subcommand", ["validate", "test", "predict", "export"])
    def test_nothing_to_look_at(self, subcommand: str, main: Main, small: list[str], tmp_path: Path, capsys: Any) -> None:
        with pytest.raises(SystemExit) as stop:
            main(subcommand, *small, "--ckpt_path=last")
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: no checkpoint in {tmp_path / 'run' / 'checkpoints'}\n"


def test_end_to_end(main: Main, small: list[str], tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fit, validate, test, predict, export: the same figures, the same weights bit for bit, files at fixed places."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, small = tmp_path / "run", [*small, "--trainer.limit_val_batches=1.0"]
    main("fit", *small, "--model.optimizer.lr=0.01")
    metrics = (run / "metrics.csv").read_bytes()
    last = rows_of(run / "metrics.csv")[-1]
    capsys.readouterr()
    for subcommand in ("validate", "test"):
        main(subcommand, *small, "--ckpt_path=last")
        out = capsys.readouterr().out
        assert re.search(rf"^loss \(nats\) +{float(last['val/loss']):.4f} +{float(last['val/constant_loss']):.4f}$", out, re.M)
        assert (run / f"{subcommand}.csv").exists()
    main("predict", *small, "--ckpt_path=last")
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    accuracy = sum(p["prediction"] == p["label"] for p in predictions) / len(predictions)
    assert accuracy == pytest.approx(float(last["val/accuracy"]))
    assert (run / "metrics.csv").read_bytes() == metrics
    main("export", *small, "--ckpt_path=last", "--output=out/model")
    assert capsys.readouterr().out.splitlines()[-1].split() == ["model", "out/model"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    trained = {name.removeprefix("model."): tensor for name, tensor in checkpoint(run)["state_dict"].items()}
    state, base = exported.state_dict(), AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    assert not all(torch.equal(state[name], base[name]) for name in trained)
    assert set(state) - set(trained) == {"lm_head.weight"}, "tied to the embedding"
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer("It was great") == AutoTokenizer.from_pretrained(tiny_folder)("It was great")
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    for line in (
        "| task | SST2 |",
        "| steps | 3 |",
        "| forwards | 6 |",
        "| learning rate | 0.01 |",
        "| sampler | GaussianSampler |",
        tiny_folder,
    ):
        assert line in card


def test_print_config_round_trip(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed runs as a file, to the same bits."""
    with pytest.raises(SystemExit) as stop:
        main("fit", *small, "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["init_args"]["optimizer"]["init_args"]["eps"] == 0.01
    (tmp_path / "run.yaml").write_text(printed)
    main("fit", "--config=run.yaml")
    one = checkpoint(tmp_path / "run")["state_dict"]
    main("fit", "--config", str(tmp_path / "run" / "config.yaml"), f"--trainer.default_root_dir={tmp_path / 'again'}")
    two = checkpoint(tmp_path / "again")["state_dict"]
    main("fit", *small, f"--trainer.default_root_dir={tmp_path / 'third'}")
    three = checkpoint(tmp_path / "third")["state_dict"]
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]) for name in one)


def test_one_file_for_several_subcommands(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given before the subcommand, a section of it for each."""
    with pytest.raises(SystemExit):
        main("fit", *small, "--print_config")
    settings = yaml.safe_load(capsys.readouterr().out)
    sections = {"fit": settings, "validate": {key: settings[key] for key in ("model", "data", "trainer")}}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(sections))
    main("--config=all.yaml", "fit")
    assert checkpoint(tmp_path / "run")["global_step"] == 3
    main("--config=all.yaml", "validate", "--ckpt_path=last")
    assert (tmp_path / "run" / "validate.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--help"], ["fit", "validate", "predict", "export"]),
        (["fit", "--help"], ["--model.help", "--trainer.max_steps", "--checkpoint.every_n_train_steps", "--ckpt_path"]),
        (["fit", "--model.help=zolightning.ZOFinetuneModule"], ["--model.pretrained", "Hub id or folder of the base model", "dtype"]),
        (["fit", "--data.help=zolightning.TaskDataModule"], ["--data.calibration_rows", "Rows a training batch"]),
        (["export", "--help"], ["--output", "Folder to write to"]),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_help(arguments: list[str], texts: list[str], main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert [text for text in texts if text not in out] == []


REVIEWS = """
model:
  class_path: zolightning.ZOFinetuneModule
  init_args: {{pretrained: {model}, dtype: float32, optimizer: {{lr: 1.0e-3, eps: 1.0e-2}}}}
data:
  class_path: zolightning.TaskDataModule
  init_args:
    task:
      class_path: zolightning.TemplateTask
      init_args:
        prompt: "{{text}} It was"
        candidates: [" terrible", " okay", " great"]
        label: verdict
    train_file: reviews.csv
    batch_size: 4
trainer: {{max_steps: 3, accelerator: cpu, default_root_dir: out, enable_progress_bar: false}}
"""


def test_a_strangers_csv(main: Main, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three labels by name, YAML alone; rows to predict on have no labels."""
    words = ("terrible", "okay", "great")
    (tmp_path / "reviews.csv").write_text("text,verdict\n" + "".join(f'"film {i}, really",{words[i % 3]}\n' for i in range(30)))
    (tmp_path / "new.csv").write_text("text\nfilm a\nfilm b\n")
    (tmp_path / "run.yaml").write_text(REVIEWS.format(model=tiny_folder))
    main("fit", "--config=run.yaml")
    out = capsys.readouterr().out
    assert "accuracy, bias-corrected" in out
    assert checkpoint(tmp_path / "out")["global_step"] == 3
    main("predict", "--config=run.yaml", "--ckpt_path=last", "--data.test_file=new.csv")
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [len(p["probabilities"]) for p in predictions] == [3, 3]
    assert {p["text"] for p in predictions} <= set(words)


def test_answers(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Questions with free answers, in SQuAD's columns and in a template's."""
    questions = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    flat = write_rows(tmp_path / "flat.jsonl", [{"q": row["question"], "a": row["answers"]["text"][0]} for row in QUESTIONS])
    template = {"class_path": "zolightning.TemplateTask", "init_args": {"prompt": "{q} Answer:", "answer": "a", "metric": "exact_match"}}
    for task, file in (("squad", questions), (json.dumps(template), flat)):
        files = [f"--data.task={task}", f"--data.train_file={file}", f"--data.validation_file={file}"]
        main("fit", *small, *files, "--trainer.max_steps=1")
        out = capsys.readouterr().out
        assert "exact match" in out
        assert re.search(r"^F1 ", out, re.M)
        main("predict", *small, *files, "--ckpt_path=last", "--trainer.limit_predict_batches=1")
        row = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
        assert set(row) == {"index", "prediction", "answers"}


def test_a_reward_of_ones_own(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A function in a file of the working folder."""
    (tmp_path / "my_reward_file.py").write_text("def brevity(prediction, example):\n    return 1 / (1 + len(prediction))\n")
    questions = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    objective = {"class_path": "zolightning.Reward", "init_args": {"reward": "my_reward_file.brevity", "max_new_tokens": 2}}
    main("fit", *small, "--data.task=squad", f"--data.train_file={questions}", f"--data.validation_file={questions}",
         f"--model.objective={json.dumps(objective)}", "--trainer.max_steps=1")  # fmt: skip
    assert re.search(r"^reward +0\.\d{4} +0\.\d{4}", capsys.readouterr().out, re.M)


def test_calibrated_run(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The biases are in the checkpoint, in the report, and in the export's card; without the option they are restored too."""
    calibrated = [*small, '--model.objective={"class_path": "zolightning.CandidateCrossEntropy", "init_args": {"calibrate": true}}']
    main("fit", *calibrated)
    assert "loss with the run's biases" in capsys.readouterr().out
    biases = checkpoint(tmp_path / "run")["zolightning"]["biases"]
    assert len(biases) == 2
    main("validate", *small, "--ckpt_path=last")
    assert "loss with the run's biases" in capsys.readouterr().out
    main("export", *small, "--ckpt_path=last", "--output=out")
    assert f"| candidate biases | {biases} |" in (tmp_path / "out" / "README.md").read_text()


class TestLightningFeatures:
    def test_tensorboard(self, main: Main, small: list[str], tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": str(tmp_path / "tb")}}
        main("fit", *small, f"--trainer.logger={json.dumps(logger)}", "--trainer.log_every_n_steps=1")
        (events,) = (tmp_path / "tb").rglob("events.out.tfevents*")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log = EventAccumulator(str(events))
        log.Reload()
        assert [(e.step, e.value) for e in log.Scalars("train/forwards")][-3:] == [(2, 4.0), (3, 6.0), (3, 6.0)]
        assert {"val/loss", "train/loss", "train/lr"} <= set(log.Tags()["scalars"])
        assert not (tmp_path / "run" / "metrics.csv").exists()

    def test_early_stopping(self, main: Main, small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        """The validation loss hardly moves at this rate, so patience runs out."""
        stop = {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": "val/loss", "patience": 2, "min_delta": 9},
        }
        cli = main("fit", *small, f"--trainer.callbacks=[{json.dumps(stop)}]", "--trainer.max_steps=50", "--trainer.val_check_interval=2")
        assert cli.trainer.global_step == 6
        assert "\n6 steps, 12 forwards" in capsys.readouterr().out

    def test_learning_rate_monitor(self, main: Main, small: list[str], tmp_path: Path) -> None:
        main("fit", *small, "--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]",
             "--model.lr_scheduler=torch.optim.lr_scheduler.LinearLR", "--model.lr_scheduler.total_iters=3",
             "--model.lr_scheduler.start_factor=1.0", "--model.lr_scheduler.end_factor=0.25", "--trainer.log_every_n_steps=1")  # fmt: skip
        rates = [float(row["lr-ZOOptimizer"]) for row in rows_of(tmp_path / "run" / "metrics.csv") if row["lr-ZOOptimizer"]]
        assert rates == pytest.approx([1e-4, 0.75e-4, 0.5e-4])

    def test_a_callback_and_a_sampler_of_ones_own(self, main: Main, small: list[str], tmp_path: Path) -> None:
        """One file with classes in the working folder."""
        (tmp_path / "my_parts_file.py").write_text(
            "import pathlib\nimport lightning.pytorch as pl\nimport zolightning as zl\n"
            "class Note(pl.Callback):\n"
            "    def __init__(self, path: str) -> None:\n        self.path = path\n"
            "    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):\n"
            "        with pathlib.Path(self.path).open('a') as file:\n"
            "            file.write(f'{trainer.global_step} {type(module.sampler).__name__}\\n')\n"
            "class Mine(zl.RademacherSampler):\n    '''Signs.'''\n"
        )
        main("fit", *small, "--model.sampler=my_parts_file.Mine",
             '--trainer.callbacks=[{"class_path": "my_parts_file.Note", "init_args": {"path": "notes.txt"}}]')  # fmt: skip
        assert (tmp_path / "notes.txt").read_text() == "1 Mine\n2 Mine\n3 Mine\n"

    def test_fast_dev_run(self, main: Main, small: list[str], tmp_path: Path) -> None:
        """A rehearsal leaves no trace of a run."""
        main("fit", *small, "--trainer.fast_dev_run=true")
        assert not (tmp_path / "run" / "checkpoints").exists() or list((tmp_path / "run" / "checkpoints").iterdir()) == []
        assert not (tmp_path / "run" / "metrics.csv").exists()

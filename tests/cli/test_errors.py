"""Bad input: one clear line, a non-zero status, nothing lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QUESTIONS, write_rows

Run = Callable[..., subprocess.CompletedProcess[str]]


def template(**arguments: Any) -> str:
    """A TemplateTask as an option."""
    defaults = {"prompt": "{sentence} It was", "candidates": [" terrible", " great"], "label": "label"}
    return "--data.task=" + json.dumps({"class_path": "zolightning.TemplateTask", "init_args": {**defaults, **arguments}})


def reward(name: str, **arguments: Any) -> str:
    """A reward as an option."""
    return "--model.objective=" + json.dumps({"class_path": "zolightning.Reward", "init_args": {"reward": name, **arguments}})


def films(folder: Path, **change: Any) -> list[str]:
    """Both files the same, with the row numbered 3 changed."""
    rows: list[dict[str, Any]] = [{"sentence": f"film {i}", "label": i % 2} for i in range(20)]
    rows[3] = {key: value for key, value in {**rows[3], **change}.items() if value is not ...}
    file = write_rows(folder / "bad.jsonl", rows)
    return [f"--data.train_file={file}", f"--data.validation_file={file}"]


def answers(folder: Path) -> list[str]:
    """A task with free answers."""
    file = write_rows(folder / "questions.jsonl", QUESTIONS)
    return ["--data.task=squad", f"--data.train_file={file}", f"--data.validation_file={file}"]


def empty(folder: Path, text: str = "", name: str = "empty.csv") -> str:
    """A file with this text."""
    (folder / name).write_text(text)
    return str(folder / name)


def binary(folder: Path, name: str = "a.bin") -> str:
    """No text in UTF-8."""
    (folder / name).write_bytes(b"\xff\xfe\x00")
    return str(folder / name)


def saved(folder: Path, damage: int) -> str:
    """A file of torch.save: cut, with other bytes in the middle, with other content, with a class of its own."""
    path, size = folder / "saved.ckpt", 20_000
    keys = {"state_dict": {"w": torch.ones(size)}, "global_step": 1, "pytorch-lightning_version": "2.6.0"}
    torch.save([keys, keys, {"weights": 1}, keys | {"x": Path("y")}][damage], path)
    content = path.read_bytes()
    path.write_bytes(content[: size if damage == 0 else None])
    if damage == 1:
        path.write_bytes(content[:size] + bytes(100) + content[size + 100 :])
    return str(path)


Case = tuple[Callable[[Path], list[str]], str]
CASES: dict[str, Case] = {
    "unknown task": (lambda f: ["--data.task=sst3"], "unknown task 'sst3'; known: sst2, rte, cb, boolq, wsc, wic, multirc, copa, record"),
    "missing file": (lambda f: [f"--data.train_file={f}/none.csv"], "data file {folder}/none.csv does not exist"),
    "missing validation file": (lambda f: ["--data.validation_file=none.csv"], "data file none.csv does not exist"),
    "unknown ending": (lambda f: [f"--data.train_file={empty(f, 'x', 'a.xlsx')}"], "data file {folder}/a.xlsx: unknown ending; known: .jsonl"),
    "empty cell": (
        lambda f: films(f, sentence=...), "{folder}/bad.jsonl, row 3: column 'sentence' is empty"
    ),
    "missing column of a template": (
        lambda f: [*films(f), template(prompt="{title}: {sentence}")], "column 'title' is missing; the columns are: sentence, label"
    ),
    "label out of range": (lambda f: films(f, label=2), "{folder}/bad.jsonl, row 3: label 2 is not a number from 0 to 1"),
    "label of another type": (lambda f: [*films(f), template(label="sentence")], "in column 'sentence' is none of: terrible, great"),
    "label missing": (lambda f: films(f, label=None), "{folder}/bad.jsonl, row 3: no label in column 'label'"),
    "empty file": (lambda f: [f"--data.train_file={empty(f)}"], "data file {folder}/empty.csv has no rows or cannot be read: "),
    "header alone": (lambda f: [f"--data.train_file={empty(f, 'sentence,label')}"], "data file {folder}/empty.csv has no rows"),
    "broken file": (lambda f: [f"--data.train_file={empty(f, '{', 'a.jsonl')}"], "data file {folder}/a.jsonl has no rows or cannot be read"),
    "latin text": (lambda f: [f"--data.train_file={binary(f, 'a.csv')}"], "data file {folder}/a.csv has no rows or cannot be read: 'utf-8' codec"),
    "no training rows": (lambda f: ["--data.num_train=0"], "num_train=0 must be at least 1"),
    "no validation rows": (lambda f: ["--data.num_validation=0"], "num_validation=0 must be at least 1"),
    "no batch": (lambda f: ["--data.batch_size=0"], "batch_size=0 must be at least 1"),
    "no evaluation batch": (lambda f: ["--data.eval_batch_size=0"], "eval_batch_size=0 must be at least 1"),
    "negative calibration rows": (lambda f: ["--data.calibration_rows=-1"], "calibration_rows=-1 must be at least 0"),
    "batch larger than the data": (lambda f: ["--data.batch_size=81"], "batch_size 81 is larger than the number of training rows, 80"),
    "candidate without tokens": (lambda f: [template(candidates=[" terrible", ""])], "continuation '' adds no token to the prompt"),
    "candidate of spaces": (lambda f: [template(candidates=[" terrible", "  "])], "continuation '  ' adds no token to the prompt"),
    "duplicate candidates": (lambda f: [template(candidates=[" great", "great "])], "candidate 'great' is given more than once"),
    "one candidate": (lambda f: [template(candidates=[" great"])], "give at least two"),
    "reward that raises": (
        lambda f: [*answers(f), reward("bad_rewards_file.raises", max_new_tokens=1)], "reward 'bad_rewards_file.raises' raised ZeroDivisionError"
    ),
    "reward that is not a number": (
        lambda f: [*answers(f), reward("bad_rewards_file.nan", max_new_tokens=1)], "reward 'bad_rewards_file.nan' returned nan for"
    ),
    "reward without an import": (lambda f: [*answers(f), reward("no_file_here.f")], "reward 'no_file_here.f' is neither one of f1, exact_match"),
    "reward with a broken file": (lambda f: [*answers(f), reward("broken_rewards_file.f")], "reward 'broken_rewards_file.f' "),
    "reward of another kind of task": (lambda f: [reward("f1", predict="choose")], "reward 'f1' needs a task with free answers"),
    "generation for candidates": (lambda f: [reward("accuracy")], "text is generated only for tasks with a free answer"),
    "folder as data": (lambda f: [f"--data.train_file={f}"], "data file {folder} is a folder"),
    "missing model folder": (lambda f: [f"--model.pretrained={f}/none"], "model folder '{folder}/none' does not exist"),
    "missing relative folder": (lambda f: ["--model.pretrained=./none"], "model folder './none' does not exist"),
    "file as model": (lambda f: [f"--model.pretrained={empty(f)}"], "model folder '{folder}/empty.csv' is a file"),
    "no model": (lambda f: [f"--model.pretrained={f}"], "cannot load"),
    "base model without a head": (lambda f: [f"--model.pretrained={f}/headless"], "is no trained causal language model"),
    "encoder": (lambda f: [f"--model.pretrained={f}/bert"], ""),
    "unwritable folder": (lambda f: ["--trainer.default_root_dir=/dev/null/x"], "cannot write to trainer.default_root_dir='/dev/null/x': "),
    "option cut short": (lambda f: ["--trainer.max_step=5"], "--trainer.max_step=5"),
    "unknown option": (lambda f: ["--data.taks=sst2"], "taks"),
    "unknown top-level option": (lambda f: ["--modle=1"], "modle"),
    "wrong type": (lambda f: ["--trainer.max_steps=many"], "many"),
    "wrong type inside": (lambda f: ["--data.batch_size=four"], "four"),
    "unknown class": (
        lambda f: ["--model.sampler=zolightning.NoSampler"],
        "Parser key \"sampler\": Problem with given class_path 'zolightning.NoSampler': module 'zolightning' has no attribute 'NoSampler'",
    ),
    "missing configuration": (lambda f: ["--config=none.yaml"], "none.yaml"),
    "broken configuration": (lambda f: ["--config=" + empty(f, "x: 1\nmodel: [", "a.yaml")], "configuration '{folder}/a.yaml': line 2: "),
    "empty configuration": (lambda f: [f"--config={empty(f, '', 'a.yaml')}"], "configuration '{folder}/a.yaml': it holds no settings"),
    "list as configuration": (lambda f: [f"--config={empty(f, '- a', 'a.yaml')}"], "configuration '{folder}/a.yaml': it holds no settings"),
    "binary configuration": (lambda f: [f"--config={binary(f)}"], "configuration '{folder}/a.bin': it is no text in UTF-8"),
    "unknown key in a configuration": (lambda f: [f"--config={empty(f, 'modell: {x: 1}', 'a.yaml')}"], "modell"),
    "missing checkpoint": (lambda f: ["--ckpt_path=none.ckpt"], "none.ckpt"),
    "broken checkpoint": (lambda f: [f"--ckpt_path={empty(f, 'x', 'broken.ckpt')}"], "broken.ckpt"),
    "truncated checkpoint": (lambda f: [f"--ckpt_path={saved(f, 0)}"], "checkpoint '{folder}/saved.ckpt' is damaged, or no checkpoint of a run"),
    "rotten checkpoint": (lambda f: [f"--ckpt_path={saved(f, 1)}"], "checkpoint '{folder}/saved.ckpt' is damaged, or no checkpoint of a run"),
    "something else": (lambda f: [f"--ckpt_path={saved(f, 2)}"], "checkpoint '{folder}/saved.ckpt' is damaged, or no checkpoint of a run"),
    "code in a checkpoint": (lambda f: [f"--ckpt_path={saved(f, 3)}"], "checkpoint '{folder}/saved.ckpt' holds more than data"),
    "folder as checkpoint": (lambda f: [f"--ckpt_path={f}"], "checkpoint '{folder}' is a folder"),
    "no such accelerator": (lambda f: ["--trainer.accelerator=quantum"], "invalid accelerator name: `accelerator='quantum'`"),
    "processes": (
        lambda f: ["--trainer.devices=2"],
        "trainer.devices: 2 processes under DDPStrategy know nothing of forward-only steps: set trainer.strategy=zolightning.ReplicaStrategy, or trainer.devices=1",
    ),
    "replicas": (
        lambda f: ["--trainer.devices=2", "--trainer.strategy=zolightning.NoStrategy"],
        "Problem with given class_path 'zolightning.NoStrategy': module 'zolightning' has no attribute 'NoStrategy'",
    ),
    "eps below the resolution": (lambda f: ["--model.optimizer.eps=1e-9"], "eps=1e-09 is below what bfloat16 weights of this size resolve"),
    "precision": (lambda f: ["--trainer.precision=bf16-true"], "trainer.precision='bf16-true': keep 32-true"),
    "scheduler that wants a metric": (lambda f: ["--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"], "ReduceLROnPlateau"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: str) -> Path:
    """Things that a user may get wrong."""
    (tmp_path / "bad_rewards_file.py").write_text(
        "def raises(prediction, example):\n    return 1 / 0\n\ndef nan(prediction, example):\n    return float('nan')\n"
    )
    (tmp_path / "broken_rewards_file.py").write_text("def f(:\n")
    return tmp_path


def make_models(folder: Path, tiny_folder: str) -> None:
    """Folders with models that have no trained language-model head."""
    from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

    shape = {"vocab_size": 276, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(**shape, tie_word_embeddings=False)).save_pretrained(folder / "headless")
    BertModel(BertConfig(**shape)).save_pretrained(folder / "bert")
    for name in ("headless", "bert"):
        AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder / name)


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line(
    name: str, folder: Path, options: list[str], tiny_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins with "error:", names what is wrong, and no earlier run suffers."""
    from zolightning.cli import main

    if name in ("base model without a head", "encoder"):
        make_models(folder, tiny_folder)
    make, message = CASES[name]
    kept = folder / "run" / "checkpoints" / "last.ckpt"
    kept.parent.mkdir(parents=True)
    for file in (kept, folder / "run" / "metrics.csv", folder / "run" / "config.yaml"):
        file.write_text("of an earlier run")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["zolightning"])
    monkeypatch.setattr("sys.path", sys.path.copy())
    arguments = make(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options, *arguments])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message.format(folder=folder) in lines[0]
    assert 10 < len(lines[0]) < 400
    for file in (kept, folder / "run" / "metrics.csv", folder / "run" / "config.yaml"):
        assert file.read_text() == "of an earlier run"


FORKS = """
import json, os, sys
from zolightning.cli import be_quiet, run
import zolightning.command
be_quiet()
import datasets, transformers
for arguments in json.load(sys.stdin):
    if not os.fork():
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["zolightning", *arguments]
        sys.exit(run())
    status = os.waitstatus_to_exitcode(os.wait()[1])
    print(json.dumps([status, open("stderr").read()]), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_all_of_stderr(folder: Path, options: list[str], tiny_folder: str) -> None:
    """In processes of their own, with every notice of Lightning, transformers and Python: the one line. What all import is imported once."""
    make_models(folder, tiny_folder)
    expected, runs = [], []
    for name in (
        "unknown task",
        "missing column of a template",
        "latin text",
        "reward that is not a number",
        "encoder",
        "unwritable folder",
        "processes",
    ):
        make, message = CASES[name]
        runs.append(["fit", *options, *make(folder)])
        expected.append(message.format(folder=folder))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DEACTIVATE_ASYNC_LOAD": "1"}  # threads do not always survive a fork
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(command, input=json.dumps(runs), capture_output=True, text=True, cwd=folder, env=environment, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    for message, line in zip(expected, done.stdout.splitlines(), strict=True):
        status, stderr = json.loads(line)
        assert status == 2
        assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}[^\n]*\n", stderr), stderr


def test_stderr_of_a_run(run: Run, options: list[str]) -> None:
    """A run that goes well says what it has to say on stdout, the estimate before the first step too."""
    done = run("fit", *options, "--trainer.enable_progress_bar=true")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("moves", "costs", "memory", "checkpoint"):
        assert re.search(rf"^{word} ", done.stdout, re.M)


def test_export_into_a_file(options: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from zolightning.cli import main

    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["zolightning"])
    monkeypatch.setattr("sys.path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        main(["export", *options, "--output=/dev/null/x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: cannot write the model to '/dev/null/x': Not a directory"


def test_a_bug_keeps_its_traceback(options: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw is not hidden behind a line."""
    from zolightning.cli import main
    from zolightning.objectives import CandidateCrossEntropy

    def broken(self: Any, model: Any, batch: Any) -> Any:
        return [][1]

    monkeypatch.setattr(CandidateCrossEntropy, "rows", broken)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["zolightning"])
    monkeypatch.setattr("sys.path", sys.path.copy())
    with pytest.raises(IndexError):
        main(["fit", *options])


def test_full_disk(options: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """While the last checkpoint is written, and again while Lightning puts away the figures."""
    from lightning.pytorch import Trainer

    from zolightning.callbacks import RunLogger
    from zolightning.cli import main

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    monkeypatch.setattr(RunLogger, "finalize", full)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["zolightning"])
    monkeypatch.setattr("sys.path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no space left on the disk: what was written before is as it was\n"

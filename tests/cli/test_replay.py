"""``zolightning replay``, and ``fit --ckpt_path last`` with a journal: what the command says and leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kills
from zolightning.journal import read

Main = Callable[..., Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(options: list[str]) -> list[str]:
    """Six steps, a log line every two, a checkpoint every four."""
    return [*options, "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=2", "--model.optimizer.lr=0.01"]


FIT = ("--checkpoint.every_n_train_steps=4",)


def refused(main: Main, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that the command leaves with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_replay_with_the_config_of_the_run(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file names a checkpoint or none; a journal needs neither."""
    run = tmp_path / "run"
    main("fit", *small, *FIT, "--ckpt_path=last")
    capsys.readouterr()
    assert "ckpt_path" in (run / "config.yaml").read_text()
    main("replay", f"--config={run / 'config.yaml'}", f"--verify={run}/checkpoints/last.ckpt")
    assert "holds the same weights, bit for bit" in capsys.readouterr().out


def test_replay(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rebuild, compare with the checkpoint, go back in time, write an ordinary model folder."""
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    main("fit", *small, *FIT)
    capsys.readouterr()
    checkpoint = f"{run}/checkpoints/last.ckpt"
    main("replay", *small, f"--verify={checkpoint}", "--output=out")
    assert capsys.readouterr().out.splitlines() == [
        f"weights      of step 6, rebuilt from {run / 'journal.zo'}",
        f"verified     {checkpoint} holds the same weights, bit for bit",
        "model        out",
    ]
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(exported[name.removeprefix("model.")], tensor) for name, tensor in trained.items())
    main("replay", *small, "--until_step=3", f"--journal={run / 'journal.zo'}", "--output=early", f"--trainer.default_root_dir={tmp_path}")
    assert "weights      of step 3" in capsys.readouterr().out
    early = AutoModelForCausalLM.from_pretrained(tmp_path / "early", dtype=torch.bfloat16).state_dict()
    assert not all(torch.equal(early[name], tensor) for name, tensor in exported.items())


def test_errors(main: Main, small: list[str], tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    path, checkpoint = run / "journal.zo", run / "checkpoints" / "last.ckpt"
    assert refused(main, capsys, "replay", *small) == f"error: journal '{path}' does not exist"
    main("fit", *small, *FIT)
    data = path.read_bytes()
    assert (
        refused(main, capsys, "replay", *small, "--until_step=7") == "error: until_step=7 is not in the journal, which holds steps 0 to 6"
    )
    assert (
        refused(main, capsys, "replay", *small, f"--verify={path}") == f"error: checkpoint '{path}' is damaged, or no checkpoint of a run"
    )
    line = refused(main, capsys, "replay", *small, f"--verify={checkpoint}", "--until_step=2")
    assert line == f"error: checkpoint '{checkpoint}' is of step 6, until_step=2 is another one"
    assert "is of another model or space" in refused(main, capsys, "replay", *small, "--model.dtype=float32")
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"]["model.model.norm.weight"][3] += 1
    torch.save(state, tmp_path / "other.ckpt")
    line = refused(main, capsys, "replay", *small, f"--verify={tmp_path / 'other.ckpt'}")
    assert "is not what its journal says: 1 of 32 elements of block 'model.norm.weight' differ" in line
    for damaged, message in (
        (data[:100] + b"\0" + data[101:], "it is damaged at byte 8"),
        (b"x" + data, "it is no journal"),
        (data[:50], "holds no whole record"),
    ):
        path.write_bytes(damaged)
        assert message in refused(main, capsys, "replay", *small)


def test_other_base_weights(main: Main, small: list[str], tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main("fit", *small, *FIT)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.model.norm.weight[0] = 1.5
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "other")
    line = refused(main, capsys, "replay", *small, f"--model.pretrained={tmp_path / 'other'}")
    assert f"begins with other weights: those of '{tiny_folder[:80]}'" in line


def test_torn_end(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("fit", *small, *FIT)
    path = tmp_path / "run" / "journal.zo"
    path.write_bytes(path.read_bytes()[:-5])
    capsys.readouterr()
    main("replay", *small)
    out = capsys.readouterr().out
    assert "bytes were not written whole and are left out" in out
    assert "weights      of step 4" in out


def test_classes_of_ones_own(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They come from the same settings."""
    (tmp_path / "my_parts.py").write_text(
        "from zolightning import SGD, Sampler\nfrom zolightning.noise import GaussianNoise\n"
        "class Mine(GaussianNoise):\n    def draw(self, start, count, device):\n        return -super().draw(start, count, device)\n"
        "class MySampler(Sampler):\n    def noise(self, block, key):\n        return Mine(key)\n"
        "class MyRule(SGD):\n    def move(self, coefficients, lr):\n        return super().move(coefficients.sign(), lr)\n"
    )
    own = [*small, "--model.sampler=my_parts.MySampler", "--model.optimizer.rule=my_parts.MyRule"]
    main("fit", *own, *FIT)
    main("replay", *own, f"--verify={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}")
    assert "bit for bit" in capsys.readouterr().out


def test_last_without_a_checkpoint(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main("fit", *small, *FIT)
    (run / "checkpoints" / "last.ckpt").unlink()
    capsys.readouterr()
    main("fit", *small, *FIT, "--ckpt_path=last", "--trainer.max_steps=9")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"no checkpoint in {run / 'checkpoints'}: going on from the journal alone"
    assert "journal      steps 0 to 6 are taken from it, without forwards" in out
    main("fit", *small, *FIT, "--trainer.max_steps=9", f"--trainer.default_root_dir={tmp_path / 'whole'}")
    assert kills.weights(run) == kills.weights(tmp_path / "whole")


def test_an_exception_in_a_users_reward(main: Main, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps before it are kept; mended, the run ends as if it had not been."""
    from runs import QUESTIONS, write_rows

    (tmp_path / "my_reward.py").write_text(
        "import pathlib\ncalls = [0]\n"
        "def reward(prediction, example):\n"
        "    calls[0] += 1\n"
        "    if calls[0] > 60 and not pathlib.Path('mended').exists():\n        raise KeyError('oh')\n"
        "    return 1 / (1 + len(prediction))\n"
    )
    file = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    objective = {"class_path": "zolightning.Reward", "init_args": {"reward": "my_reward.reward", "max_new_tokens": 2}}
    own = [*small, "--data.task=squad", f"--data.train_file={file}", f"--data.validation_file={file}", "--data.batch_size=4",
           f"--model.objective={json.dumps(objective)}"]  # fmt: skip
    line = refused(main, capsys, "fit", *own)
    assert "reward 'my_reward.reward' raised KeyError" in line
    steps = read(tmp_path / "run" / "journal.zo").steps
    assert 0 < steps < 6
    (tmp_path / "mended").touch()
    main("fit", *own, "--ckpt_path=last")
    assert f"steps 0 to {steps} are taken from it" in capsys.readouterr().out
    main("fit", *own, f"--trainer.default_root_dir={tmp_path / 'whole'}")
    assert kills.weights(tmp_path / "run") == kills.weights(tmp_path / "whole")


@pytest.mark.parametrize("arguments", [["replay", "--help"]])
def test_help(arguments: list[str], main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for text in ("--journal", "--until_step", "--verify", "--output", "Checkpoint whose weights must be those of the journal"):
        assert text in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_five_kills(small: list[str]) -> None:
    """SIGKILL at random moments and inside checkpoint writes; each run ends in the bits of one without a break."""
    options = [*small, *FIT, "--trainer.max_steps=12", "--model.sampler=zolightning.RademacherSampler"]
    command = ["-m", "benchmarks.kills", "--kills=5", "--kills-a-run=3", "--seed=1", f"--options={json.dumps(options)}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == 5
    assert result["equal"] == result["runs"]
    assert (result["failed"], result["lost"]) == (0, 0)
    assert len(set(result["steps_at_kills"])) > 1, "the moments must differ"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("cannot mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(
    main: Main, small: list[str], small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint does not fit; the journal does, and nothing is lost."""
    run = small_disk / "run"
    (small_disk / "ballast").write_bytes(bytes(150 << 10))
    own = [*small, *FIT, f"--trainer.default_root_dir={run}"]
    assert refused(main, capsys, "fit", *own) == "error: no space left on the disk: what was written before is as it was"
    assert (read(run / "journal.zo").steps, read(run / "journal.zo").torn) == (4, 0)
    assert not (run / "checkpoints" / "last.ckpt").exists()
    (small_disk / "ballast").unlink()
    main("fit", *own, "--ckpt_path=last")
    assert "steps 0 to 4 are taken from it" in capsys.readouterr().out
    main("fit", *small, *FIT, f"--trainer.default_root_dir={tmp_path / 'whole'}")
    assert kills.weights(run) == kills.weights(tmp_path / "whole")

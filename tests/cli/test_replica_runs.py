"""Several processes as a user starts them: the script, the module, one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPLICAS = ("--trainer.strategy", "zolightning.ReplicaStrategy")
QUERIES = ("--model.estimator=zolightning.TwoPoint", "--model.estimator.queries=2", "--model.sampler=zolightning.RademacherSampler")


def start(command: list[str], arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """The command with its own working folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *arguments], stdout=pipe, stderr=pipe, text=True, cwd=folder, env=environment)


def script(folder: Path) -> list[str]:
    """What pip installs as ``zolightning``."""
    path = folder / "zolightning"
    path.write_text("import sys\nfrom zolightning.cli import run\nif __name__ == '__main__':\n    sys.exit(run())\n", encoding="utf-8")
    return [sys.executable, str(path)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of the last checkpoint."""
    return dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])


def test_one_two_three(main: Callable[..., Any], options: list[str], tmp_path: Path) -> None:
    """One process, two through the script and, resumed, three through the module: the same weights, one report."""
    module = [sys.executable, "-m", "zolightning"]
    runs = [tmp_path / name for name in ("one", "many")]
    one = ["fit", *options, *QUERIES, "--model.estimator.queries=3", f"--trainer.default_root_dir={runs[0]}"]
    many = [*one, f"--trainer.default_root_dir={runs[1]}", *REPLICAS, "--trainer.strategy.mode=directions"]
    main(*one)
    second = start(script(tmp_path), [*many, "--trainer.devices=2", "--trainer.max_steps=3"], tmp_path)
    printed = second.communicate(timeout=120)
    assert (second.returncode, printed[1]) == (0, "")
    assert printed[0].count("3 steps, 18 forwards") == printed[0].count("2, each with its share of the directions") == 1
    third = start(module, [*many, "--trainer.devices=3", "--ckpt_path=last"], tmp_path)
    printed = third.communicate(timeout=120)
    assert (third.returncode, printed[1]) == (0, "")
    assert printed[0].count("6 steps, 36 forwards") == 1
    expected, found = weights(runs[0]), weights(runs[1])
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_one_is_killed(options: list[str], tmp_path: Path) -> None:
    """The other says so and leaves; what is there can be resumed."""
    run = tmp_path / "run"
    arguments = [
        "fit",
        *options,
        *QUERIES,
        *REPLICAS,
        "--trainer.devices=2",
        "--trainer.max_steps=100000",
        "--checkpoint.every_n_train_steps=2",
    ]
    process = start([sys.executable, "-m", "zolightning"], arguments, tmp_path)
    last, end = run / "checkpoints" / "last.ckpt", time.monotonic() + 100
    while not last.exists() and time.monotonic() < end:
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    killed = time.monotonic()
    errors = process.communicate(timeout=60)[1]
    assert time.monotonic() - killed < 30
    message = "error: replica 1 was killed (SIGKILL); the run goes on from its last checkpoint, with any number of replicas\n"
    assert (process.returncode, errors) == (2, message)
    assert weights(run)

"""A tiny model on disk and the command that trains it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"sentence": f"{adjective} {thing} number {i}", "label": int(adjective == "fine")}
    for i in range(20)
    for adjective in ("fine", "dull")
    for thing in ("film", "plot")
]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eighty rows with the columns of SST-2."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


@pytest.fixture
def options(tiny_folder: str, rows_file: str, tmp_path: Path) -> list[str]:
    """Arguments of a small run; later ones win."""
    return [
        "--model=zolightning.ZOFinetuneModule", f"--model.pretrained={tiny_folder}", '--model.optimizer={"lr": 1e-4, "eps": 0.01}',
        "--data=zolightning.TaskDataModule", "--data.task=sst2", f"--data.train_file={rows_file}", f"--data.validation_file={rows_file}",
        "--data.batch_size=8", "--data.calibration_rows=16", "--data.num_validation=24", "--trainer.accelerator=cpu",
        "--trainer.max_steps=6", "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Start the command in a process of its own."""

    def start(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "zolightning", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd or tmp_path, env=environment, timeout=200)

    return start


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command in the working folder of a user."""
    from zolightning.cli import main as entry

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["zolightning"])
    monkeypatch.setattr("sys.path", sys.path.copy())
    return lambda *arguments: entry(list(arguments))

"""Every YAML that is shipped is parsed."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import QUESTIONS, write_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_recipe(path: Path, tiny_folder: str, rows_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs for two steps; a model and rows that do not come with the package are replaced by small ones."""
    from zolightning.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["zolightning"])
    rows = write_rows(tmp_path / "questions.jsonl", QUESTIONS) if "task: squad" in path.read_text() else rows_file
    small = [f"--model.pretrained={tiny_folder}", f"--data.train_file={rows}", f"--data.validation_file={rows}"]
    cli = main([
        "fit", f"--config={path}", *([] if "pretrained: demo" in path.read_text() else small), "--trainer.accelerator=cpu",
        "--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--model.optimizer.eps=0.01",
        "--data.batch_size=4",
    ])  # fmt: skip
    assert cli.trainer.global_step == 2


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "grids").glob("*.yaml")), ids=lambda path: path.name)
def test_grid(path: Path, tmp_path: Path) -> None:
    """It loads, and names runs that could start."""
    from benchmarks import grid

    config = grid.load(path) | {"ledger": str(tmp_path / "empty.jsonl")}
    assert grid.next_runs(config)

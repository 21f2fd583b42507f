"""Every YAML that is shipped is parsed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from runs import QUESTIONS, write_rows

ROOT = Path(__file__).parents[2]


RECIPES = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "meta"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe(path: Path, tiny_folder: str, rows_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs for two steps; a model and rows that do not come with the package are replaced by small ones."""
    from zolightning.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["zolightning"])
    rows = write_rows(tmp_path / "questions.jsonl", QUESTIONS) if "task: squad" in path.read_text() else rows_file
    small = [f"--model.pretrained={tiny_folder}", f"--data.train_file={rows}", f"--data.validation_file={rows}"]
    if "PolicySampler" in path.read_text():  # the shipped policy on a model of other shapes
        small += ["--model.sampler.match=kind", "--data.task=sst2"]
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
    from benchmarks.plan import Plan

    config = grid.load(path) | {"ledger": str(tmp_path / "empty.jsonl")}
    assert Plan(config).next_runs()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "meta").glob("*.yaml")), ids=lambda path: path.name)
def test_meta(
    path: Path, tiny_folder: str, rows_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Meta-training runs for two steps, and a fine-tuning run takes what it has written."""
    from zolightning.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["zolightning"])
    config = yaml.safe_load(path.read_text())
    sources = config["data"]["init_args"].get("sources", [config["data"]])
    for source in sources:
        source["init_args"] |= {"task": "sst2", "train_file": rows_file, "validation_file": rows_file, "batch_size": 16, "num_train": 40}
    config["model"]["init_args"]["pretrained"] = tiny_folder
    meta_objective = config["model"]["init_args"]["meta_objective"]
    if meta_objective["class_path"] != "zolightning.AfterStep":
        meta_objective["init_args"] |= {"warm_up": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    quiet = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]
    cli = main(["fit", "--config=small.yaml", *quiet, "--trainer.log_every_n_steps=1"])
    assert cli.trainer.global_step == 2
    folder = Path(config["trainer"]["default_root_dir"])
    out = capsys.readouterr().out
    assert f"sampler      {tmp_path / folder / 'sampler.yaml'}" in out
    assert "2 steps to go" in out
    assert (folder / "config.yaml").exists()
    cli = main([
        "fit", f"--config={ROOT / 'configs' / 'recipes' / 'sst2_smollm2.yaml'}", f"--model.pretrained={tiny_folder}",
        f"--data.train_file={rows_file}", f"--data.validation_file={rows_file}", "--data.batch_size=4", *quiet,
        "--trainer.limit_val_batches=0",
        "--model.optimizer.eps=0.01", f"--model.sampler={folder / 'sampler.yaml'}",
    ])  # fmt: skip
    assert cli.trainer.global_step == 2
    assert len(set(cli.model.sampler.scales().tolist())) > 1
    assert cli.model.sampler.refresh_every == config["model"]["init_args"].get("refresh_every", 1)

"""Small runs in Python that the tests share: rows, a data module, a module, a Trainer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

import zolightning as zl

FILMS = [
    {"sentence": f"{adjective} {thing} number {i}", "label": int(adjective == "fine")}
    for i in range(10)
    for adjective in ("fine", "dull")
    for thing in ("film", "plot")
]
QUESTIONS = [
    {"title": "Cities", "context": f"{city} is in {land}.", "question": f"Where is {city}?", "answers": {"text": [land, f"in {land}"]}}
    for city, land in (("Rome", "Italy"), ("Paris", "France"), ("Bern", "Switzerland"), ("Oslo", "Norway"), ("Lima", "Peru"))
] * 3


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as JSON lines; the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def film_data(folder: Path, task: Any = "sst2", rows: list[dict[str, Any]] = FILMS, **options: Any) -> zl.TaskDataModule:
    """Rows in a file of the folder, the same ones for training and validation."""
    file = write_rows(folder / "rows.jsonl", rows)
    return zl.TaskDataModule(task, file, file, **{"batch_size": 4, "eval_batch_size": 16, "calibration_rows": 16, **options})


def make_module(pretrained: str, lr: float = 1e-3, eps: float = 1e-2, seed: int = 0, **options: Any) -> zl.ZOFinetuneModule:
    """A module in float32; ``kind``: its class."""
    kind = options.pop("kind", zl.ZOFinetuneModule)
    return kind(pretrained, **{"dtype": "float32", "optimizer": partial(zl.ZOOptimizer, lr=lr, eps=eps, seed=seed), **options})


def make_trainer(folder: Path, max_steps: int = 4, **options: Any) -> pl.Trainer:
    """A silent Trainer on the CPU."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    more = {"accelerator": "cpu", "max_epochs": -1, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    if any(isinstance(callback, pl.callbacks.Checkpoint) for callback in options.get("callbacks", [])):
        quiet.pop("enable_checkpointing")
    return pl.Trainer(default_root_dir=folder, max_steps=max_steps, **{**quiet, **more, **options})

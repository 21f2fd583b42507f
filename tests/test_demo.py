"""The model and the rows that come with the package."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import torch

import zolightning
from zolightning import CandidateCrossEntropy, DenseSpace, RademacherSampler, TaskDataModule, ZOOptimizer
from zolightning.models import load_model, load_tokenizer

DEMO = Path(zolightning.__file__).parent / "demo"


def data() -> TaskDataModule:
    """The quickstart's rows."""
    out = TaskDataModule("demo", tokenizer=load_tokenizer("demo"), num_train=None, num_validation=None)
    out.setup("fit")
    return out


def test_size_and_licence() -> None:
    """Small, attributed, and without a word for word repetition between training and validation."""
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 8 << 20
    assert "CC BY-SA 4.0" in (DEMO / "README.md").read_text(encoding="utf-8")
    rows = data()
    assert len(rows.validation_examples) >= 500
    assert not {example.prompt for example in rows.train_examples} & {example.prompt for example in rows.validation_examples}


def test_unseen_rows() -> None:
    """No validation row is one of those on which the quickstart's settings were chosen, nor shares eight words in a row with one."""
    runs = []
    for name in ("tuning", "validation"):
        lines = gzip.decompress((DEMO / "data" / f"{name}.jsonl.gz").read_bytes()).decode().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        words = [re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text) for text in texts]
        runs.append({tuple(text[i : i + 8]) for text in words for i in range(len(text) - 7)})
    assert len(runs[0]) > 640 < len(runs[1])
    assert not runs[0] & runs[1]


def test_balanced_and_one_forward() -> None:
    """Four balanced classes, each one token."""
    rows = data()
    assert rows.one_forward
    assert sorted({rows.train_labels.count(label) for label in range(4)}) == [400]


def test_it_learns_and_repeats() -> None:
    """Forty steps lower the training loss; the same seed gives the same losses, and after ten steps the same bits."""
    rows, objective, runs, ends = data(), CandidateCrossEntropy(), [], []
    for more in (30, 0):
        model = load_model("demo", "float32")
        space = DenseSpace(model, include=["model.layers.2.*", "model.norm.weight"])
        optimizer = ZOOptimizer(space, RademacherSampler(), lr=2e-3, eps=2e-3)
        losses = [float(optimizer.step(objective.on(model, rows.train_batch(step)))) for step in range(10)]
        ends.append([block.tensor.detach().clone() for block in space.blocks])
        losses += [float(optimizer.step(objective.on(model, rows.train_batch(step)))) for step in range(10, 10 + more)]
        runs.append(losses)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert runs[0][:10] == runs[1]
    assert sum(runs[0][-10:]) < 0.8 * sum(runs[0][:10])

"""The verdict on ledgers whose right answer is known, one in which ours loses among them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import compare, ledger, verdict
from benchmarks.headroom import headroom

FORWARDS = (0, 2000, 4000)


def write(path: Path, method: str, task: str, seed: int, losses: tuple[float, ...], metric: float = 0.5, **more: Any) -> None:
    """A run with these losses at 0, 2,000 and 4,000 forwards."""
    base = {"stage": "final", "method": method, "model": "m", "task": task, "seed": seed, "lr": 0.1, "metric": "accuracy"}
    base["forwards_asked"] = FORWARDS[-1]
    how = {"machine": "x", "commit": "c", "torch": "2", "accuracy": metric, "accuracy_corrected": metric + 0.01}
    for forwards, loss in zip(FORWARDS, losses, strict=True):
        figures = {"loss": loss, "loss_corrected": loss - 0.1, "constant_loss": 0.7, **more}
        ledger.append(path, {**base, **how, **figures, "forwards": forwards, "final": forwards == FORWARDS[-1]})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A grid of two methods, three tasks and two seeds, and its ledger: Adam finds something to learn on a and b, not on c."""
    path = tmp_path / "ledger.jsonl"
    methods = {"adam": {"build": "x", "seeds": [0]}, "uniform": {"build": "x"}, "half": {"build": "x"}, "ours": {"build": "x"}}
    config = {"ledger": str(path), "models": {"m": "m"}, "tasks": {"a": {}, "b": {}, "c": {}}, "methods": methods,
              "search": {"seed": 9, "forwards": 1, "lrs": [1.0]}, "final": {"seeds": [0, 1], "forwards": 4000}}  # fmt: skip
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(config))
    for task, loss in (("a", 0.5), ("b", 0.7), ("c", 0.76)):
        write(path, "adam", task, 0, (1.0, 0.9, loss))
    return tmp_path / "grid.yaml", path


def judged(files: tuple[Path, Path], *options: str) -> dict[str, Any]:
    """The JSON that compare writes."""
    out = files[0].parent / "policy.json"
    compare.main([str(files[0]), "--out", str(out), *options])
    content: dict[str, Any] = json.loads(out.read_text())
    assert out.with_suffix(".png").stat().st_size > 1000
    return content


def test_wins(files: tuple[Path, Path]) -> None:
    """A reduction of 10 % on one task and of 30 % on the other: mean 20 %, interval from one to the other."""
    for task, share in (("a", 0.9), ("b", 0.7), ("c", 5.0)):
        for seed in (0, 1):
            write(files[1], "uniform", task, seed, (1.0, 0.9, 0.8), metric=0.6)
            write(files[1], "half", task, seed, (1.0, 0.9, 0.8))
            write(files[1], "ours", task, seed, (1.0, 0.6 if task == "a" else 0.78, 0.8 * share), metric=0.63)
    content = judged(files)
    found, raw = content["verdict"], content["verdict"]["against"]["uniform"]["raw"]
    assert found["counted"] == ["a", "b"]
    assert found["no_headroom"] == ["c"]
    assert raw["reduction"] == pytest.approx(0.2)
    assert (raw["low"], raw["high"]) == (pytest.approx(0.1), pytest.approx(0.3))
    assert (raw["wins"], raw["pairs"], raw["holds"]) == (4, 4, True)
    corrected = found["against"]["uniform"]["corrected"]
    assert corrected["by_task"]["a"] == pytest.approx(1 - (0.72 - 0.1) / 0.7)
    assert found["metric_gain"]["raw"] == pytest.approx(3)
    # 1.0 to 0.6 in 2,000 forwards passes 0.8 after 1,000 of 4,000; 1.0 to 0.78 after 2,000 / 1.1.
    assert found["share_by_task"]["raw"] == {"a": pytest.approx(0.25), "b": pytest.approx(0.5 / 1.1)}
    assert (found["beats_each"], found["metric_holds"], found["forwards_hold"]) == (True, True, True)
    assert len(content["rows"]) == 21
    assert content["rows"][0].keys() >= {"method", "task", "seed", "lr", "forwards", "loss", "loss_corrected", "metric", "metric_corrected",
                                         "constant_loss"}  # fmt: skip


def test_loses(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Better than uniform, worse than the upper half on one task in two: it does not hold, and uniform's loss is reached late."""
    for seed in (0, 1):
        for task in ("a", "b"):
            write(files[1], "uniform", task, seed, (1.0, 0.9, 0.8))
            write(files[1], "half", task, seed, (1.0, 0.9, 0.6 if task == "a" else 0.9))
            write(files[1], "ours", task, seed, (1.0, 0.9, 0.79))
    found = judged(files)["verdict"]
    assert found["against"]["uniform"]["raw"]["holds"]
    half = found["against"]["half"]["raw"]
    assert (half["wins"], half["pairs"], half["holds"], found["beats_each"]) == (2, 4, False, False)
    assert half["low"] == pytest.approx(1 - 0.79 / 0.6)
    assert not found["forwards_hold"]
    assert not found["metric_holds"]
    assert "| half | raw | -0.097 | -0.317 to +0.122 | 2 of 4 | **no** |" in capsys.readouterr().out.splitlines()


def test_nothing_is_invented(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs that are missing are named and nothing holds; a method that diverged has lost without a number; no figure where none exists."""
    write(files[1], "ours", "a", 0, (1.0, 0.9, 0.7))
    write(files[1], "uniform", "a", 0, (1.0, 0.9, 0.8))
    write(files[1], "half", "a", 0, (1.0, 0.9, float("nan")))
    for method in ("ours", "uniform", "half"):
        write(files[1], method, "b", 0, (1.0, 0.9, 0.8), constant_loss=None)
    (files[0].parent / "chosen.json").write_text(json.dumps({"tasks": ["b"]}))
    content = judged(files, "--chosen", str(files[0].parent / "chosen.json"))
    found = content["verdict"]
    assert (found["counted"], found["trained_on"], found["beats_each"]) == (["a"], ["b"], False)
    assert found["against"]["uniform"]["raw"]["missing"] == ["a seed 1"]
    half = found["against"]["half"]["raw"]
    assert (half["wins"], half["pairs"], half["reduction"], half["diverged"]) == (1, 1, None, ["a seed 0: other"])
    assert [row["loss"] for row in content["rows"] if row["method"] == "half"] == [None, 0.8]
    assert next(row for row in content["rows"] if row["task"] == "b" and row["method"] == "ours")["constant_loss"] is None
    assert "**Partial**: 2 planned pairs" in capsys.readouterr().out


def test_headroom_of_a_task_without_candidates(tmp_path: Path) -> None:
    """What it has to beat is then the untrained model."""
    for task, loss in (("little", 0.96), ("much", 0.9)):
        write(tmp_path / "l.jsonl", "adam", task, 0, (1.0, 0.9, loss), constant_loss=None)
    rows = [{k: v for k, v in row.items() if k != "loss_corrected"} for row in ledger.read(tmp_path / "l.jsonl")]
    assert {task: (one.constant, one.there) for task, one in headroom(rows).items()} == {"little": (False, False), "much": (False, True)}


def test_a_run_that_starts_again(tmp_path: Path) -> None:
    """Points of a run that was cut off do not count."""
    write(tmp_path / "l.jsonl", "ours", "a", 0, (1.0, 0.9, 0.8))
    rows = ledger.read(tmp_path / "l.jsonl")
    assert [point.forwards for point in verdict.curves(rows[:2] + rows)["ours"]["a", 0]] == list(FORWARDS)


def test_share_of_forwards() -> None:
    """Where the other has become worse there is nothing to reach; what is never reached counts as infinite."""

    def run(*losses: float) -> list[verdict.Point]:
        return [verdict.Point(f, {"raw": loss}, {}) for f, loss in zip(FORWARDS, losses, strict=True)]

    ours = {
        ("worse", 0): run(1.0, 0.9, 0.8),
        ("late", 0): run(1.0, 0.95, 0.9),
        ("half", 0): run(1.0, 0.7, 0.6),
        ("half", 1): run(1.0, 0.7, 0.6),
    }
    other = {
        ("worse", 0): run(1.0, 0.9, 1.1),
        ("late", 0): run(1.0, 0.9, 0.8),
        ("half", 0): run(1.0, 0.9, 0.7),
        ("half", 1): run(1.0, 1.2, 1.2),
    }
    found = verdict.shares(ours, other, list(ours), "raw")
    assert math.isnan(found.pop("worse"))
    assert found == {"late": math.inf, "half": pytest.approx(0.5)}


def test_seeds_vary_within_tasks() -> None:
    """One task with two seeds: its interval spans them; a task's many seeds do not outweigh the other task."""
    assert verdict.interval([[0.1, 0.3]]) == (pytest.approx(0.1), pytest.approx(0.3))
    low, high = verdict.interval([[0.1] * 50, [0.3]])
    assert (low, high) == (pytest.approx(0.1), pytest.approx(0.3))

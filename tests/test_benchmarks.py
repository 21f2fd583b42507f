"""The measuring tools measure what they say."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import ledger, report, tasks_smoke, three_ways
from benchmarks.plan import Plan
from benchmarks.runs import FIELDS, Run
from benchmarks.textbook import Textbook


def config(folder: Path) -> dict[str, Any]:
    """Two methods, one of which shares the other's learning rate."""
    return {
        "ledger": str(folder / "ledger.jsonl"),
        "models": {"m": "model"},
        "tasks": {"t": {}},
        "methods": {"a": {"build": "x"}, "b": {"build": "x", "lr_of": "a", "seeds": [0]}},
        "search": {"seed": 9, "forwards": 10, "lrs": [1e-3, 1e-2], "factor": 10},
        "final": {"seeds": [0, 1], "forwards": 40},
    }


def write(settings: dict[str, Any], run: Run, loss: float) -> None:
    """Pretend that a run has ended."""
    row = {name: getattr(run, name) for name in FIELDS} | {"final": True, "loss": loss, "loss_corrected": loss}
    ledger.append(Path(settings["ledger"]), row)


def test_grid_searches_then_adds_an_edge_then_runs(tmp_path: Path) -> None:
    """An end of the list that wins gets one more point, once; then every seed runs with the best rate."""
    settings = config(tmp_path)
    first = Plan(settings).next_runs()
    assert [(run.stage, run.method, run.lr) for run in first] == [("search", "a", 1e-3), ("search", "a", 1e-2)]
    for run in first:
        write(settings, run, loss=1.0 - run.lr)
    (edge,) = Plan(settings).next_runs()
    assert (edge.stage, edge.method, edge.lr) == ("search", "a", 0.1)
    write(settings, edge, loss=0.5)
    finals = [(run.stage, run.method, run.seed, run.lr) for run in Plan(settings).next_runs()]
    assert finals == [("final", "a", 0, 0.1), ("final", "b", 0, 0.1), ("final", "a", 1, 0.1)]


def test_grid_resumes(tmp_path: Path) -> None:
    """What is in the ledger is not run again; a torn last line does not matter."""
    settings = config(tmp_path)
    first = Plan(settings).next_runs()
    write(settings, first[0], loss=0.9)
    with Path(settings["ledger"]).open("a") as file:
        file.write('{"stage": "sea')
    assert Plan(settings).next_runs() == first[1:]


def test_nan_is_never_the_best_rate(tmp_path: Path) -> None:
    """A run that diverged loses."""
    settings = config(tmp_path)
    for run, loss in zip(Plan(settings).next_runs(), (0.9, float("nan")), strict=True):
        write(settings, run, loss)
    assert Plan(settings).best_lr(("a", "m", "t")) == 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_textbook_walk(dtype: torch.dtype) -> None:
    """In float64 the walk comes back and the step descends; in bfloat16 a step of nothing still moves the weights."""
    torch.manual_seed(0)
    net = nn.Linear(20, 20, bias=False).to(dtype)
    before = net.weight.detach().clone()
    loop = Textbook(net, lr=1e-12, eps=1e-3)
    for _ in range(10):
        loop.step(lambda: net.weight.float().square().sum())
    drift = float((net.weight - before).abs().max())
    assert loop.forwards == 20
    assert drift < 1e-8 if dtype == torch.float64 else drift > 1e-4


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Table and picture from a ledger."""
    path = tmp_path / "l.jsonl"
    base = {"stage": "final", "method": "a", "model": "m", "task": "t", "lr": 0.1, "machine": "x", "commit": "c", "torch": "2"}
    for seed, loss in ((0, 0.5), (1, 0.7)):
        for forwards, value in ((0, 1.0), (40, loss)):
            row = base | {"seed": seed, "forwards": forwards, "loss": value, "final": forwards == 40}
            path.open("a").write(json.dumps(row) + "\n")
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    report.main()
    assert "0.600 ± 0.141" in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 1000


def test_quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows stay in the file as commands come, newer ones in place of older ones; the layers take half a byte a weight."""
    from benchmarks import quantised

    small = ["--shapes", "tiny", "--tokens", "8", "--repeats", "1", "--out", str(tmp_path)]
    for more in (["--spaces", "bank", "scales", "--quantizations", "nf4"], ["--spaces", "scales", "--quantizations", "nf4", "int8"]):
        monkeypatch.setattr("sys.argv", ["quantised", *small, *more])
        quantised.main()
    rows = json.loads((tmp_path / "quantised.json").read_text())["rows"]
    assert [(row["quantization"], row["space"]) for row in rows] == [("nf4", "bank"), ("nf4", "scales"), ("int8", "scales")]
    assert {row["command"].split(" ", 3)[3] for row in rows[1:]} == {" ".join([*small, *more])}
    assert all(row["ratio"] == pytest.approx(row["ours_ms"] / row["limit_ms"], rel=1e-3) for row in rows)
    assert re.search(r"^tiny +int8 +scales +0\.00 +- +- +- +\d", capsys.readouterr().out, re.M)
    model = quantised.make("tiny", "nf4", torch.device("cpu"))
    packed = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.uint8)
    assert packed == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48) // 2


def test_three_ways(tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command line, a user's subclass and a plain loop end in the same bits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["three_ways"])
    monkeypatch.setattr("sys.path", sys.path.copy())
    rows = [{"sentence": f"{word} film {i}", "label": int(word == "fine"), "idx": i} for i in range(20) for word in ("fine", "dull")]
    (tmp_path / "sst2").mkdir()
    with gzip.open(tmp_path / "sst2" / "train.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "sst2" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = argparse.Namespace(pretrained=tiny_folder, data=str(tmp_path), dtype="bfloat16", steps=5, lr=1e-4, eps=0.01)
    digests = three_ways.compare(options)
    assert digests["plain loop"] == digests["command line"] == digests["user's subclass"] != digests["untrained"]


def test_collect_statistics(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks, two places each; what is there is not measured again; the closed form takes the result."""

    from benchmarks import collect_statistics
    from zolightning.modules.statistics import mean_statistics

    films = [{"sentence": f"{word} film {i}", "label": int(word == "fine")} for i in range(30) for word in ("fine", "dull")]
    reviews = [{"text": row["sentence"], "label": row["label"]} for row in films]
    for task, rows in (("sst2", films), ("rotten_tomatoes", reviews)):
        (tmp_path / task).mkdir()
        (tmp_path / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    command = [
        "collect_statistics",
        "--pretrained",
        tiny_folder,
        "--data",
        str(tmp_path),
        "--rows",
        "4",
        "--batches",
        "2",
        "--output",
        str(output),
    ]
    for tasks in ("sst2", "sst2,rotten_tomatoes"):
        monkeypatch.setattr(sys, "argv", [*command, "--tasks", tasks, "--trajectory", "3", "--points", "2", "--together", "4"])
        collect_statistics.main()
    found = collect_statistics.load(output / "statistics.jsonl")
    assert list(found) == [("sst2", 0), ("sst2", 3), ("rotten_tomatoes", 0), ("rotten_tomatoes", 3)]
    assert not torch.equal(found["sst2", 0].fisher, found["sst2", 3].fisher)
    mean = mean_statistics(list(found.values()), normalise=True)
    assert float(mean.decrease_scales().max()) > 0


def test_meta_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on a CPU too, where it measures time alone."""
    from benchmarks import meta_memory

    output = tmp_path / "memory.jsonl"
    command = [
        "meta_memory",
        "--shape",
        "tiny",
        "--rows",
        "2",
        "--length",
        "8",
        "--steps",
        "1",
        "--dtype",
        "float32",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", command)
    meta_memory.main()
    (row,) = ledger.read(output)
    assert row["weights"] > 0
    assert row["seconds_per_step"] > 0


def small_tasks(folder: Path) -> Path:
    """Rows of one task of each kind."""
    rows: dict[str, list[dict[str, Any]]] = {
        "sst2": [{"sentence": f"{word} film {i}", "label": int(word == "fine")} for i in range(20) for word in ("fine", "dull")],
        "copa": [
            {"premise": f"It rained {i} days.", "choice1": "We got wet.", "choice2": "I sang a song.", "question": "effect", "label": i % 2}
            for i in range(40)
        ],
        "drop": [{"passage": f"Ann has {i} cats.", "question": "How many?", "answers_spans": {"spans": [str(i)]}} for i in range(40)],
    }
    for task, lines in rows.items():
        (folder / task).mkdir(parents=True)
        for split in ("train", "validation"):
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_tasks_smoke(tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A row a task with no problems; a task without data has one; scores that differ are found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tasks_smoke"])
    monkeypatch.setattr("sys.path", sys.path.copy())
    out, data = tmp_path / "out.jsonl", small_tasks(tmp_path / "data")
    common = ["--pretrained", tiny_folder, "--data", str(data), "--dtype=float32", "--accelerator=cpu", "--lr=1e-3", "--eps=1e-2"]
    small = [*common, "--steps=3", "--rows=6", "--out", str(out)]
    rows = tasks_smoke.run_all(tasks_smoke.parse([*small, "--tasks", "sst2", "copa", "drop", "rte"]))
    assert rows == ledger.read(out)
    assert [row["problems"] for row in rows[:3]] == [[], [], []]
    assert rows[3]["problems"] == [f"ValueError: {data / 'rte'} has no train.jsonl"]
    assert [sorted({"accuracy", "f1"} & row["after"].keys()) for row in rows[:3]] == [["accuracy"], ["accuracy"], ["f1"]]
    assert all(row["before"]["loss"] != row["after"]["loss"] and row["seconds"] > 0 for row in rows[:3])
    lines = tasks_smoke.table(rows).splitlines()
    assert [line.split()[0] for line in lines] == ["task", "sst2", "copa", "drop", "rte"]
    assert [line.endswith("ok") for line in lines[1:]] == [True, True, True, False]
    monkeypatch.setattr(tasks_smoke, "plain_score", lambda *arguments: -1.0)
    (row,) = tasks_smoke.run_all(tasks_smoke.parse([*small, "--tasks", "copa"]))
    assert "from plain ones" in row["problems"][0]

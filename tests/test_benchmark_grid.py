"""The order of a grid's runs, what an end of the list adds, tasks left out, time; and one run of each kind on a tiny model."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from runs import FILMS, QUESTIONS, write_rows

from benchmarks import grid, ledger
from benchmarks.plan import Plan
from benchmarks.runs import FIELDS, Run, execute
from benchmarks.times import FIXED, estimate


def config(folder: Path, **methods: Any) -> dict[str, Any]:
    """A grid of two tasks; Adam first."""
    return {
        "ledger": str(folder / "ledger.jsonl"), "models": {"m": "model"}, "tasks": {"s": {}, "t": {}},
        "methods": {"adam": {"build": "x", "first": True, "lrs": [0.5], "seeds": [0], "cost": 2}, **methods},
        "search": {"seed": 9, "forwards": 10, "lrs": [1.0, 2.0, 4.0], "factor": 2}, "final": {"seeds": [0, 1], "forwards": 4000},
        "seconds": {"t": 100},
    }  # fmt: skip


def end(settings: dict[str, Any], run: Run, loss: float, **more: Any) -> None:
    """Pretend that a run has ended."""
    row = {name: getattr(run, name) for name in FIELDS} | {"loss": loss, "loss_corrected": loss, "constant_loss": 0.7, "metric": "accuracy"}
    ledger.append(Path(settings["ledger"]), row | {"forwards": run.forwards_asked, "final": True, "wall": 5.0} | more)


def valley(run: Run) -> float:
    """Best at the middle of the list; nothing for Adam's only rate."""
    return abs(run.lr - 2.0) if run.method != "adam" else 0.0


def finish(settings: dict[str, Any], loss: Callable[[Run], float]) -> list[tuple[Any, ...]]:
    """Run everything, one after another, as far as it goes; the order by stage, method, task, seed and rate."""
    order = []
    while runs := Plan(settings).next_runs():
        order.append((runs[0].stage, runs[0].method, runs[0].task, runs[0].seed, runs[0].lr))
        end(settings, runs[0], loss(runs[0]))
    return order


def test_order(tmp_path: Path) -> None:
    """Adam on all tasks; then, of all methods, the task that has headroom; searches before runs, one seed after the other."""
    settings = config(tmp_path, a={"build": "x"}, b={"build": "x", "seeds": [0, 1, 2]})
    order = finish(settings, lambda run: (0.69 if run.task == "s" else 0.5) + valley(run))
    assert [cell[:3] for cell in order[:4]] == [
        ("search", "adam", "s"),
        ("final", "adam", "s"),
        ("search", "adam", "t"),
        ("final", "adam", "t"),
    ]
    assert [cell[2] for cell in order[4:]] == ["t"] * 11 + ["s"] * 11
    assert [cell[0] for cell in order[4:15]] == ["search"] * 6 + ["final"] * 5
    assert [(cell[1], cell[3]) for cell in order[10:15]] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2)]
    assert Plan(settings).outlook() == (0, 0.0)


def test_an_end_that_wins_adds_a_point_for_all(tmp_path: Path) -> None:
    """Not for Adam, whose list is another one, and not on the other task."""
    settings = config(tmp_path, a={"build": "x"}, b={"build": "x"})
    order = finish(settings, lambda run: 1 - run.lr / 10 if (run.method, run.task) == ("a", "t") else 0.5 + valley(run))
    searched = {(method, task): sorted(lr for stage, m, t, _, lr in order if (stage, m, t) == ("search", method, task))
                for method in ("adam", "a", "b") for task in ("s", "t")}  # fmt: skip
    assert searched["a", "t"] == searched["b", "t"] == [1.0, 2.0, 4.0, 8.0]
    assert searched["a", "s"] == searched["b", "s"] == [1.0, 2.0, 4.0]
    assert searched["adam", "t"] == [0.5]
    assert {lr for stage, m, t, _, lr in order if (stage, m, t) == ("final", "a", "t")} == {8.0}


def test_long_runs_try_smaller_rates(tmp_path: Path) -> None:
    """Over the whole budget, on one seed, and the best is taken; a method whose searches are as long keeps the rate that it has found."""
    settings = config(tmp_path, a={"build": "x"}, b={"build": "x", "forwards": 400})
    settings["search"]["forwards"], settings["final"]["factors"] = 1000, [1.0, 0.5, 0.25]
    order = finish(settings, lambda run: abs(run.lr - 1.0) if run.stage == "trial" else 0.5 + valley(run))
    assert [cell[2:] for cell in order if cell[:2] == ("trial", "a")] == [(task, 9, lr) for task in ("s", "t") for lr in (2.0, 1.0, 0.5)]
    assert {cell[1] for cell in order if cell[0] == "trial"} == {"adam", "a"}
    assert {(cell[1], cell[4]) for cell in order if cell[0] == "final"} == {("adam", 0.5), ("a", 1.0), ("b", 2.0)}
    assert Plan(settings).outlook() == (0, 0.0)


def test_one_factor_needs_no_trial(tmp_path: Path) -> None:
    """The rate is taken as it is."""
    settings = config(tmp_path, a={"build": "x"})
    settings["search"]["forwards"], settings["final"]["factors"] = 1000, [0.5]
    order = finish(settings, lambda run: 0.5 + valley(run))
    assert {(cell[1], cell[4]) for cell in order if cell[0] == "final"} == {("adam", 0.25), ("a", 1.0)}
    assert not any(cell[0] == "trial" for cell in order)


def test_methods_that_have_diverged_are_done(tmp_path: Path) -> None:
    """In all searches, or in all trials: there is no rate to run with."""
    settings = config(tmp_path, a={"build": "x"}, b={"build": "x"})
    settings["final"]["factors"] = [1.0, 0.5]
    bad = {("search", "a"), ("trial", "b")}
    order = finish(settings, lambda run: math.nan if (run.stage, run.method) in bad else 0.5 + valley(run))
    assert {cell[1] for cell in order if cell[0] == "final"} == {"adam"}
    assert Plan(settings).outlook() == (0, 0.0)


def test_runs_at_other_rates_do_not_count(tmp_path: Path) -> None:
    """A ledger may hold long runs from before the trials: they stay there, and are run again at the rate that was found."""
    settings = config(tmp_path, a={"build": "x"})
    settings["final"]["factors"] = [1.0, 0.5]
    for rate in (2.0, 8.0):
        end(settings, Plan(settings).run("final", ("a", "m", "s"), 0, rate), 0.5)
    order = finish(settings, lambda run: 0.5 + valley(run))
    assert [cell[3:] for cell in order if cell[:3] == ("final", "a", "s")] == [(1, 2.0)]
    plan = Plan(settings)
    assert [row for row in plan.rows if row not in plan.current()] == [row for row in plan.rows if row["lr"] == 8.0]


def test_headroom_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task on which Adam finds nothing is left out where the grid says so; Adam itself runs on it."""
    settings = config(tmp_path, a={"build": "x"})
    monkeypatch.setattr("benchmarks.plan.headroom", lambda rows: {"s": SimpleNamespace(there=True), "t": SimpleNamespace(there=False)})
    assert {(run.method, run.task) for run in Plan(settings).left()} == {("adam", "s"), ("adam", "t"), ("a", "s"), ("a", "t")}
    settings["headroom_only"] = True
    assert {(run.method, run.task) for run in Plan(settings).left()} == {("adam", "s"), ("adam", "t"), ("a", "s")}
    assert {(run.method, run.task) for run in Plan(settings).next_runs()} == {("adam", "s"), ("adam", "t"), ("a", "s")}


def test_methods_of_a_task(tmp_path: Path) -> None:
    """``{task}`` in an argument is the task's name; a method may have its own budget."""
    settings = config(tmp_path, a={"build": "x", "forwards": 7, "arguments": {"policy": "without_{task}/p", "queries": 1}})
    run = next(run for run in Plan(settings).next_runs() if (run.method, run.task) == ("a", "t"))
    assert run.settings["method"]["arguments"] == {"policy": "without_t/p", "queries": 1}
    assert run.forwards_asked == 7


def test_estimates(tmp_path: Path) -> None:
    """A guess at first, then what the ledger has: of the same method, else of the others that cost alike."""
    settings = config(tmp_path, a={"build": "x"}, b={"build": "x"})

    def run(method: str, task: str = "t") -> Run:
        return Plan(settings).run("final", (method, "m", task), 0, 2.0)

    assert estimate(run("a"), [], settings) == FIXED + 100
    assert estimate(run("adam"), [], settings) == FIXED + 200
    end(settings, run("a"), 0.5, wall=40.0)
    rows = ledger.read(Path(settings["ledger"]))
    assert [estimate(run(method), rows, settings) for method in ("a", "b", "adam")] == [40, 40, FIXED + 200]


def test_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No run starts that would end too late; what is left is said, and the next call does it."""
    settings = config(tmp_path, a={"build": "x"})

    def pretend(run: Run) -> str:
        end(settings, run, 0.5 + valley(run))
        return "done"

    monkeypatch.setattr(grid, "execute", pretend)
    pool = SimpleNamespace(Pool=lambda workers, see, gpu, maxtasksperchild: ThreadPool(workers))
    monkeypatch.setattr(grid.multiprocessing, "get_context", lambda kind: pool)
    assert grid.run_all(settings, 2, minutes=0.05) == 0
    assert not Plan(settings).done
    settings["seconds"] = {"s": 0, "t": 1e6}
    grid.run_all(settings, 2, minutes=0.5)
    assert {key[3] for key in Plan(settings).done} == {"s"}
    settings["seconds"]["t"] = 0
    grid.run_all(settings, 2, minutes=0.5)
    assert Plan(settings).outlook()[0] == 0
    assert "0 runs are left" in capsys.readouterr().out


def test_all_gpus_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU has workers of its own, who see no other, and the next run goes where least is going on."""
    settings, used = config(tmp_path, a={"build": "x"}), Counter[int]()

    def pool(workers: int, see: Any, gpu: tuple[int], maxtasksperchild: int) -> Any:
        def apply_async(execute: Any, arguments: tuple[Run]) -> Any:
            used[gpu[0]] += 1
            return threads.apply_async(execute, arguments)

        threads = ThreadPool(workers)
        return nullcontext(SimpleNamespace(apply_async=apply_async))

    monkeypatch.setattr(grid, "execute", lambda run: end(settings, run, 0.5 + valley(run)))
    monkeypatch.setattr(grid.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(grid.multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=pool))
    assert grid.run_all(settings, 2) == 0
    assert Plan(settings).outlook()[0] == 0
    assert set(used) == {0, 1}
    for visible, name in (("", ""), ("4,7", "7")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        grid.see(1)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == name


def test_runs(tmp_path: Path, tiny_folder: str) -> None:
    """A task with candidates and one with free answers, whose text is generated at the ends only; one that diverges ends as such."""
    films, questions = write_rows(tmp_path / "films.jsonl", FILMS), write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    small = {"batch_size": 4, "eval_batch_size": 8, "num_train": 16, "max_length": 96, "calibration_rows": 8}
    tasks = {"sst2": {"task": "sst2", "train_file": films, "validation_file": films, **small},
             "squad": {"task": "squad", "train_file": questions, "validation_file": questions, "max_new_tokens": 2, **small}}  # fmt: skip
    methods = {
        "exact": {"build": "benchmarks.methods.exact", "dtype": "float32"},
        "adam": {"build": "benchmarks.methods.adam", "dtype": "float32"},
    }
    settings = yaml.safe_load(yaml.safe_dump({
        "ledger": str(tmp_path / "l.jsonl"), "models": {"tiny": tiny_folder}, "tasks": tasks, "methods": methods,
        "search": {"seed": 9, "forwards": 4, "lrs": [1e-3], "factor": 2}, "final": {"seeds": [0], "forwards": 8, "evaluations": 2},
    }))  # fmt: skip
    for method, task, lr in (("exact", "sst2", 1e-3), ("adam", "sst2", 1e-3), ("exact", "squad", 1e-3), ("adam", "sst2", 1e30)):
        execute(Plan(settings).run("final", (method, "tiny", task), 0, lr))
    rows = ledger.read(tmp_path / "l.jsonl")
    assert [row["forwards"] for row in rows[:9]] == [0, 4, 8] * 3
    assert all({"loss", "loss_corrected", "accuracy", "accuracy_corrected", "constant_loss"} <= row.keys() for row in rows[:6])
    assert ["f1" in row for row in rows[6:9]] == [True, False, True]
    assert [row["final"] for row in rows[:9]] == [False, False, True] * 3
    assert (rows[-1]["final"], math.isnan(rows[-1]["loss"]), "diverged" in rows[-1]) == (True, True, True)
    execute(Plan(settings).run("search", ("exact", "tiny", "sst2"), 9, 1e-3))
    (found,) = ledger.read(tmp_path / "l.jsonl")[len(rows) :]
    assert (found["stage"], found["forwards"], found["final"]) == ("search", 4, True)

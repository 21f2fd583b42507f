"""Compare methods: method x task x model x seed x learning rate from one YAML, into one resumable ledger.

    python -m benchmarks.grid benchmarks/grids/sst2_precision.yaml --workers 6

Every method first searches its learning rate (``search``: one seed, a short run, held-out training rows decide), then runs with
the best one (``final``). If an end of the list wins for one of the methods that share it, one point beyond is added for all of them. A run
that is in the ledger is not run again, so the same command goes on where the last one stopped. With ``--minutes`` it ends by itself.

The order: methods marked ``first``, of all tasks; then task by task, tasks without headroom (benchmarks.headroom) last; within a task all
searches, then all methods of the first seed, then of the next. So what is there when time is up can be compared.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import ledger
from benchmarks.headroom import headroom
from benchmarks.runs import FIELDS, Run, execute
from benchmarks.times import clock, estimate

Done = dict[tuple[Any, ...], ledger.Row]


def load(path: Path) -> dict[str, Any]:
    """Read a grid; ``${NAME}`` in strings is taken from the environment."""
    config: dict[str, Any] = yaml.safe_load(os.path.expandvars(path.read_text(encoding="utf-8")))
    return config


def make_run(config: dict[str, Any], stage: str, method: str, model: str, task: str, seed: int, lr: float) -> Run:
    """A cell; ``{task}`` in a method's arguments is the task's name."""
    own = dict(config["methods"][method])
    arguments = {k: v.replace("{task}", task) if isinstance(v, str) else v for k, v in own.get("arguments", {}).items()}
    settings = {"method": own | {"arguments": arguments}, "model": config["models"][model], "task": config["tasks"][task]}
    settings |= {"evaluations": config[stage].get("evaluations", 1), "ledger": config["ledger"]}
    return Run(stage, method, model, task, seed, float(lr), own.get("forwards", config[stage]["forwards"]), settings)


def cells(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """All (method, model, task)."""
    return [(method, model, task) for method in config["methods"] for model in config["models"] for task in config["tasks"]]


def finished(config: dict[str, Any]) -> Done:
    """Final rows by run key."""
    rows = ledger.read(Path(config["ledger"]))
    return {tuple(row[name] for name in FIELDS): row for row in rows if row["final"]}


def next_runs(config: dict[str, Any], done: Done | None = None) -> list[Run]:
    """The runs that can start now and are not in the ledger, in the order in which they should."""
    done = finished(config) if done is None else done
    wanted: list[Run] = []
    passed = screened(config, done)
    for method, model, task in cells(config):
        source = config["methods"][method].get("lr_of", method)  # a method may share the rate that another one found
        searches = pending_searches(config, done, source, model, task)
        if searches or searching(config, done, source, model, task):
            wanted += searches if source == method else []
            continue
        best = best_lr(done, source, model, task)
        if best is None or method not in passed:
            continue
        seeds = config["methods"][method].get("seeds", config["final"]["seeds"])
        wanted += [make_run(config, "final", method, model, task, seed, best) for seed in seeds]
    return in_order(config, done, [run for run in wanted if run.key not in done])


def in_order(config: dict[str, Any], done: Done, runs: list[Run]) -> list[Run]:
    """Runs sorted so that a table that is cut off is of use."""
    tasks, names, found = list(config["tasks"]), list(config["methods"]), headroom(ledger.read(Path(config["ledger"])))

    def place(run: Run) -> tuple[int, ...]:
        seeds = config["methods"][run.method].get("seeds", config["final"]["seeds"])
        seed = seeds.index(run.seed) if run.stage == "final" else -1
        hopeless = run.task in found and not found[run.task].there
        late = not config["methods"][run.method].get("first", False)
        return late, late and hopeless, tasks.index(run.task), run.stage == "final", seed, names.index(run.method)

    return sorted(runs, key=place)


def rates(config: dict[str, Any], method: str) -> list[float]:
    """The listed learning rates of a method."""
    return [float(lr) for lr in config["methods"][method].get("lrs", config["search"]["lrs"])]


def searchers(config: dict[str, Any], method: str) -> list[str]:
    """The methods that search the same list of rates."""
    own = rates(config, method)
    return [other for other, settings in config["methods"].items() if "lr_of" not in settings and rates(config, other) == own]


def listed(config: dict[str, Any], method: str, model: str, task: str, lrs: list[float]) -> list[Run]:
    """A method's searches at these rates."""
    return [make_run(config, "search", method, model, task, config["search"]["seed"], lr) for lr in lrs]


def searching(config: dict[str, Any], done: Done, method: str, model: str, task: str) -> bool:
    """Whether a method that shares the list of rates is still at it: its winner may be an end."""
    lrs = rates(config, method)
    return any(run.key not in done for other in searchers(config, method) for run in listed(config, other, model, task, lrs))


def pending_searches(config: dict[str, Any], done: Done, method: str, model: str, task: str) -> list[Run]:
    """The searches that are still to run: the listed rates, then one point beyond each end that won for one of the sharing methods."""
    lrs = rates(config, method)
    missing = [run for run in listed(config, method, model, task, lrs) if run.key not in done]
    if missing or len(lrs) == 1 or searching(config, done, method, model, task):
        return missing
    winners = {best_lr(done, other, model, task, lrs) for other in searchers(config, method)}
    factor = config["search"]["factor"]
    extra = [edge for end, edge in ((min(lrs), min(lrs) / factor), (max(lrs), max(lrs) * factor)) if end in winners]
    return [run for run in listed(config, method, model, task, [float(f"{lr:.3g}") for lr in extra]) if run.key not in done]


def best_lr(done: Done, method: str, model: str, task: str, among: list[float] | None = None) -> float | None:
    """The searched rate with the lowest bias-corrected loss (raw where there is none) on held-out training rows."""
    best = best_search(done, method, model, task, among)
    return None if best is None else float(best["lr"])


def best_search(done: Done, method: str, model: str, task: str, among: list[float] | None = None) -> ledger.Row | None:
    """The row of that search; none where nothing has ended, or all have diverged."""
    rows = [row for row in done.values() if (row["stage"], row["method"], row["model"], row["task"]) == ("search", method, model, task)]
    usable = [row for row in rows if row["loss"] == row["loss"] and (among is None or row["lr"] in among)]
    return min(usable, key=decisive, default=None)


def decisive(row: ledger.Row) -> float:
    """The figure that decides: the bias-corrected loss, or the raw one where there are no biases."""
    return float(row["loss_corrected"] if "loss_corrected" in row else row["loss"])


def screened(config: dict[str, Any], done: Done) -> set[str]:
    """The methods that may run to the end: all but candidates, and the ``screen`` best of those once all have searched all tasks.

    Candidates are ranked by the mean logarithm of their best searched loss.
    """
    candidates = [method for method, settings in config["methods"].items() if settings.get("candidate")]
    passed = set(config["methods"]) - set(candidates)
    if len(candidates) <= config.get("screen", math.inf):
        return passed | set(candidates)
    places = [(model, task) for model in config["models"] for task in config["tasks"]]
    totals = dict.fromkeys(candidates, 0.0)
    for method in candidates:
        for model, task in places:
            if searching(config, done, method, model, task) or pending_searches(config, done, method, model, task):
                return passed
            best = best_search(done, method, model, task)
            totals[method] += math.log(decisive(best)) if best is not None else math.inf
    return passed | set(sorted(candidates, key=totals.__getitem__)[: config["screen"]])


def outlook(config: dict[str, Any], done: Done) -> tuple[int, float]:
    """How many runs are left, those that wait for a search included, and their seconds one after another."""
    rows, count, seconds = list(done.values()), 0, 0.0
    for method, model, task in cells(config):
        own = config["methods"][method]
        seeds, lrs = own.get("seeds", config["final"]["seeds"]), [] if "lr_of" in own else rates(config, method)
        final = [make_run(config, "final", method, model, task, seed, 0.0) for seed in seeds]
        ended = {key[FIELDS.index("seed")] for key in done if key[:4] == ("final", method, model, task)}
        left = [run for run in final if run.seed not in ended] if method in screened_or_open(config, done) else []
        left += [run for run in listed(config, method, model, task, lrs) if run.key not in done]
        left += [run for run in pending_searches(config, done, method, model, task) if run.lr not in lrs and run.key not in done]
        count, seconds = count + len(left), seconds + sum(estimate(run, rows, config) for run in left)
    return count, seconds


def screened_or_open(config: dict[str, Any], done: Done) -> set[str]:
    """The methods that will run to the end as far as that is known; of candidates that still search, the first ``screen``."""
    passed = screened(config, done)
    candidates = [method for method, settings in config["methods"].items() if settings.get("candidate")]
    return passed if any(method in passed for method in candidates) else passed | set(candidates[: config.get("screen", len(candidates))])


def run_all(config: dict[str, Any], workers: int, minutes: float = math.inf) -> int:
    """Run what is left, as far as the time goes; returns how many runs failed."""
    start, failed = time.monotonic(), set[tuple[Any, ...]]()
    running: dict[tuple[Any, ...], Any] = {}
    done = finished(config)
    count, seconds = outlook(config, done)
    print(f"{count} runs are left, about {clock(seconds / workers)} with {workers} workers; {len(done)} are done", flush=True)
    # A fresh process now and then, so that what compilers and graphs leave behind does not pile up.
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=16) as pool:
        while True:
            left = minutes * 60 - (time.monotonic() - start)
            done = finished(config)
            for run in next_runs(config, done) if len(running) < workers else ():
                fits = estimate(run, list(done.values()), config) < left
                if len(running) < workers and run.key not in running and run.key not in failed and fits:
                    running[run.key] = pool.apply_async(execute, (run,))
            if not running or left < 0:
                break
            for key in [key for key, result in running.items() if result.ready()]:
                try:
                    print(f"{time.monotonic() - start:6.0f} s  {running.pop(key).get()}", flush=True)
                except Exception as error:  # one bad cell must not end the grid
                    failed.add(key)
                    print("failed:", *key, error, file=sys.stderr, flush=True)
            time.sleep(0.2)
        if running:
            print(f"time is up: {len(running)} runs were cut off and will start again", flush=True)
            pool.terminate()
    count, seconds = outlook(config, finished(config))
    print(f"{count} runs are left, about {clock(seconds / workers)}", flush=True)
    return len(failed)


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the GPU")
    parser.add_argument("--ledger", help="another results file than the YAML's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run that would end later; cut off what runs then")
    parser.add_argument("--dry-run", action="store_true", help="list the runs that could start now, in their order")
    arguments = parser.parse_args(options)
    config = load(arguments.config)
    config["ledger"] = arguments.ledger or config["ledger"]
    if arguments.dry_run:
        for run in next_runs(config):
            print(*run.key)
        return
    if failed := run_all(config, arguments.workers, arguments.minutes):
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main()

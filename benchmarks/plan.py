"""Which runs of a grid are left, and in which order they start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import ledger
from benchmarks.headroom import headroom
from benchmarks.runs import FIELDS, Run
from benchmarks.times import estimate

Cell = tuple[str, str, str]  # method, model, task
STAGES = ("search", "trial", "final")


class Plan:
    """A grid and what its ledger has of it.

    Args:
        config: The grid.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.methods, self.search, self.final = config, config["methods"], config["search"], config["final"]
        self.rows = ledger.read(Path(config["ledger"]))
        self.done = {tuple(row[name] for name in FIELDS): row for row in self.rows if row["final"]}
        self._searched: dict[Cell, list[ledger.Row]] = defaultdict(list)
        for row in self.done.values():
            if row["stage"] == "search" and row["forwards_asked"] == self._budget("search", row["method"]):
                self._searched[row["method"], row["model"], row["task"]].append(row)
        self._points: dict[tuple[Any, ...], list[float]] = {}

    @cached_property
    def cells(self) -> list[Cell]:
        """All (method, model, task)."""
        return [(method, model, task) for method in self.methods for model in self.config["models"] for task in self.config["tasks"]]

    def run(self, stage: str, cell: Cell, seed: int, lr: float) -> Run:
        """A run; ``{task}`` in a method's arguments is the task's name."""
        method, model, task = cell
        own = self.methods[method]
        arguments = {k: v.replace("{task}", task) if isinstance(v, str) else v for k, v in own.get("arguments", {}).items()}
        settings = {"method": own | {"arguments": arguments}, "model": self.config["models"][model], "task": self.config["tasks"][task]}
        settings |= {"evaluations": self._part(stage).get("evaluations", 1), "ledger": self.config["ledger"]}
        return Run(stage, method, model, task, seed, float(lr), self._budget(stage, method), settings)

    def _budget(self, stage: str, method: str) -> int:
        return int(self.methods.get(method, {}).get("forwards", self._part(stage)["forwards"]))

    def _part(self, stage: str) -> dict[str, Any]:
        return self.search if stage == "search" else self.final

    def next_runs(self) -> list[Run]:
        """The runs that can start now and are not in the ledger, in the order in which they should."""
        wanted: list[Run] = []
        for cell in filter(self.counts, self.cells):
            source = self.source(cell)
            if missing := self.missing_searches(source):
                wanted += missing if source == cell else []
            elif self.searching(source):
                continue
            elif missing := self.missing_trials(source):
                wanted += missing if source == cell else []
            elif (best := self.final_lr(source)) is not None:
                wanted += [run for seed in self.seeds(cell[0]) if (run := self.run("final", cell, seed, best)).key not in self.done]
        return sorted(wanted, key=self._place)

    def _place(self, run: Run) -> tuple[int, ...]:
        """Where a run comes, so that a table that is cut off is of use."""
        seed = self.seeds(run.method).index(run.seed) if run.stage == "final" else 0
        late = not self.methods[run.method].get("first", False)
        hopeless = late and self._hopeless(run.task)
        task, method = list(self.config["tasks"]).index(run.task), list(self.methods).index(run.method)
        return late, hopeless, task, STAGES.index(run.stage), seed, method

    @cached_property
    def _headroom(self) -> dict[str, Any]:
        return headroom(self.rows)

    def seeds(self, method: str) -> list[int]:
        """Seeds of a method's final runs."""
        return list(self.methods[method].get("seeds", self.final["seeds"]))

    def source(self, cell: Cell) -> Cell:
        """Whose learning rate a method takes: mostly its own."""
        return (self.methods[cell[0]].get("lr_of", cell[0]), *cell[1:])

    def rates(self, method: str) -> list[float]:
        """The listed learning rates of a method."""
        return [float(lr) for lr in self.methods[method].get("lrs") or self.search["lrs"]]

    def sharing(self, cell: Cell) -> list[Cell]:
        """The methods that search the same list of rates, on the same task."""
        own = self.rates(cell[0])
        return [(other, *cell[1:]) for other, settings in self.methods.items() if "lr_of" not in settings and self.rates(other) == own]

    def searched(self, cell: Cell, lrs: list[float]) -> bool:
        """Whether searches with all these rates have ended."""
        return set(lrs) <= {row["lr"] for row in self._searched[cell] if row["seed"] == self.search["seed"]}

    def searching(self, cell: Cell) -> bool:
        """Whether a method that shares the list of rates is still at it: its winner may be an end."""
        lrs = self.rates(cell[0])
        return any(not self.searched(other, lrs) for other in self.sharing(cell))

    def points(self, cell: Cell) -> list[float]:
        """All rates to be searched: the listed ones, then one beyond each end that won for one of the sharing methods."""
        lrs = self.rates(cell[0])
        if len(lrs) == 1 or self.searching(cell):
            return lrs
        key = (*cell[1:], *lrs)
        if key not in self._points:
            winners, factor = {self.best_lr(other, lrs) for other in self.sharing(cell)}, self.search["factor"]
            beyond = [edge for end, edge in ((min(lrs), min(lrs) / factor), (max(lrs), max(lrs) * factor)) if end in winners]
            self._points[key] = [*lrs, *(float(f"{lr:.3g}") for lr in beyond)]
        return self._points[key]

    def missing_searches(self, cell: Cell) -> list[Run]:
        """The searches of a method that have not ended."""
        return [run for lr in self.points(cell) if (run := self.run("search", cell, self.search["seed"], lr)).key not in self.done]

    def best_lr(self, cell: Cell, among: list[float] | None = None) -> float | None:
        """The searched rate with the lowest bias-corrected loss (raw where there is none) on held-out training rows."""
        best = self.best_search(cell, among)
        return None if best is None else float(best["lr"])

    def trials(self, cell: Cell) -> list[Run]:
        """Runs as long as the final ones that decide between several ``final.factors`` of the best searched rate.

        The longer a run, the smaller the rate that is best for it: noise adds up over all steps. A method whose search was as long as its
        final runs keeps the rate that it has found.
        """
        best = self.best_lr(cell)
        if best is None:
            return []
        longer = self._budget("final", cell[0]) > self._budget("search", cell[0])
        factors = self.final.get("factors", [1.0]) if longer else [1.0]
        return [self.run("trial", cell, self.search["seed"], float(f"{best * factor:.3g}")) for factor in factors]

    def missing_trials(self, cell: Cell) -> list[Run]:
        """The trials of a method that have not ended; where there is one factor there is nothing to decide."""
        trials = self.trials(cell)
        return [run for run in trials if run.key not in self.done] if len(trials) > 1 else []

    def final_lr(self, cell: Cell) -> float | None:
        """The rate of the final runs: of the trial with the lowest loss; none where it is not known yet, or all have diverged."""
        trials = self.trials(cell)
        if len(trials) == 1:
            return trials[0].lr
        rows = [self.done[run.key] for run in trials if run.key in self.done]
        usable = [row for row in rows if row["loss"] == row["loss"]]
        return float(min(usable, key=decisive)["lr"]) if len(rows) == len(trials) and usable else None

    def current(self) -> list[ledger.Row]:
        """The ledger without long runs at other rates than a method's, which it may hold from before its trials."""
        rates = {cell: self.final_lr(self.source(cell)) for cell in self.cells}

        def counts(row: ledger.Row) -> bool:
            rate = rates.get((row["method"], row["model"], row["task"]))
            return row["stage"] != "final" or rate is None or row["lr"] == rate

        return list(filter(counts, self.rows))

    def best_search(self, cell: Cell, among: list[float] | None = None) -> ledger.Row | None:
        """The row of that search; none where nothing has ended, or all have diverged."""
        usable = [row for row in self._searched[cell] if row["loss"] == row["loss"] and (among is None or row["lr"] in among)]
        return min(usable, key=decisive, default=None)

    def counts(self, cell: Cell) -> bool:
        """Whether a method is to be tried on a task: with ``headroom_only`` not where Adam has found nothing to learn."""
        return self.methods[cell[0]].get("first", False) or not (self.config.get("headroom_only") and self._hopeless(cell[2]))

    def _hopeless(self, task: str) -> bool:
        return task in self._headroom and not self._headroom[task].there

    def left(self) -> Iterator[Run]:
        """All runs that are left, those that wait for searches included, with a rate of 0 where it is not known yet."""
        for cell in filter(self.counts, self.cells):
            source = self.source(cell)
            waits = [*self.missing_searches(source), *self.missing_trials(source)]
            if source == cell:
                yield from waits
            rate = 0.0 if waits or self.searching(source) else self.final_lr(source)
            if rate is not None:
                yield from (run for seed in self.seeds(cell[0]) if (run := self.run("final", cell, seed, rate)).key not in self.done)

    def outlook(self) -> tuple[int, float]:
        """How many runs are left, and their seconds one after another."""
        left, finals = list(self.left()), list(self.done.values())
        return len(left), sum(estimate(run, finals, self.config) for run in left)


def decisive(row: ledger.Row) -> float:
    """The figure that decides: the bias-corrected loss, or the raw one where there are no biases."""
    return float(row["loss_corrected"] if "loss_corrected" in row else row["loss"])

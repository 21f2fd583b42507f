"""Does one method beat another? Pairs of runs on the same task and seed, with intervals over tasks and seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks import ledger

KINDS = ("raw", "corrected")
Pair = tuple[str, int]  # task, seed


class Point(NamedTuple):
    """What was measured after some forwards; ``corrected`` figures are the raw ones where a task has no candidates to correct for."""

    forwards: int
    loss: dict[str, float]
    metric: dict[str, float]


def curves(rows: Iterable[ledger.Row]) -> dict[str, dict[Pair, list[Point]]]:
    """Final-stage runs that have ended: by method, by task and seed, the points in order."""
    found: dict[tuple[str, str, int, float], list[Point]] = defaultdict(list)
    ended: dict[str, dict[Pair, list[Point]]] = defaultdict(dict)
    for row in rows:
        if row["stage"] != "final":
            continue
        key = (row["method"], row["task"], row["seed"], row["lr"])
        if row["forwards"] == 0:
            found[key] = []  # a run that starts again
        loss, metric = float(row["loss"]), float(row.get(row["metric"], math.nan))
        of_loss = {"raw": loss, "corrected": float(row.get("loss_corrected", loss))}
        of_metric = {"raw": metric, "corrected": float(row.get(f"{row['metric']}_corrected", metric))}
        found[key].append(Point(row["forwards"], of_loss, of_metric))
        if row["final"]:
            ended[row["method"]][row["task"], row["seed"]] = found[key]
    return dict(ended)


@dataclass(frozen=True)
class Comparison:
    """Ours against one other method, in one kind of figures.

    Args:
        reduction: Mean over tasks of the mean over seeds of ``1 - ours / other``, losses at the end.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        wins: Pairs in which ours has the lower loss.
        pairs: Pairs there are.
        by_task: Mean reduction by task.
        diverged: Pairs of which a run has diverged: ``other`` ones are wins without a number, an ``ours`` makes the mean NaN.
        missing: Planned pairs that are not there.
    """

    reduction: float
    low: float
    high: float
    wins: int
    pairs: int
    by_task: dict[str, float]
    diverged: list[str]
    missing: list[str]

    @property
    def holds(self) -> bool:
        """Interval above zero, three wins in four, nothing missing."""
        return self.low > 0 and self.wins >= 0.75 * self.pairs > 0 and not self.missing


def compare(ours: Mapping[Pair, list[Point]], other: Mapping[Pair, list[Point]], planned: Iterable[Pair], kind: str) -> Comparison:
    """Ours against another method on the planned pairs.

    Args:
        ours: Points by task and seed.
        other: Likewise.
        planned: Tasks and seeds that both are meant to have.
        kind: ``raw`` or ``corrected``.
    """
    reductions: dict[str, list[float]] = defaultdict(list)
    wins, diverged, missing, count = 0, list[str](), list[str](), 0
    for pair in planned:
        name = f"{pair[0]} seed {pair[1]}"
        if pair not in ours or pair not in other:
            missing.append(name)
            continue
        mine, theirs = ours[pair][-1].loss[kind], other[pair][-1].loss[kind]
        count += 1
        wins += mine < theirs or (math.isnan(theirs) and not math.isnan(mine))
        if math.isnan(mine) or math.isnan(theirs):
            diverged.append(f"{name}: {'ours' if math.isnan(mine) else 'other'}")
        if not math.isnan(theirs):
            reductions[pair[0]].append(1 - mine / theirs)
        elif math.isnan(mine):
            reductions[pair[0]].append(math.nan)
    by_task = {task: statistics.fmean(values) for task, values in reductions.items()}
    low, high = interval(list(reductions.values()))
    mean = statistics.fmean(by_task.values()) if by_task else math.nan
    return Comparison(mean, low, high, wins, count, by_task, diverged, missing)


def interval(groups: list[list[float]], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over groups of the mean within: groups are drawn again, and values within each of them."""
    if not groups:
        return math.nan, math.nan
    rng, slots = np.random.default_rng(seed), np.arange(len(groups))
    within = np.stack([np.asarray(group)[rng.integers(len(group), size=(draws, len(groups), len(group)))].mean(-1) for group in groups])
    chosen = rng.integers(len(groups), size=(draws, len(groups)))
    means = within[chosen, np.arange(draws)[:, None], slots].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def metric_gain(
    ours: Mapping[Pair, list[Point]], other: Mapping[Pair, list[Point]], planned: Iterable[Pair], kind: str
) -> dict[str, float]:
    """Gain in the task's metric at the end, in points of 100: mean over seeds, by task."""
    gains: dict[str, list[float]] = defaultdict(list)
    for pair in planned:
        if pair in ours and pair in other:
            gains[pair[0]].append(100 * (ours[pair][-1].metric[kind] - other[pair][-1].metric[kind]))
    return {task: statistics.fmean(values) for task, values in gains.items()}


def shares(ours: Mapping[Pair, list[Point]], other: Mapping[Pair, list[Point]], planned: Iterable[Pair], kind: str) -> dict[str, float]:
    """Share of the other's forwards after which ours has its final loss, the median over seeds, by task: infinite if never.

    NaN for a task on which the other has not got below the untrained model on any seed: there is nothing to reach.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for pair in planned:
        if pair in ours and pair in other:
            end, points = other[pair][-1], [(point.forwards, point.loss[kind]) for point in ours[pair]]
            improved = end.loss[kind] < points[0][1]
            found[pair[0]] += [reaches(points, end.loss[kind]) / end.forwards] if improved else []
    return {task: statistics.median(values) if values else math.nan for task, values in found.items()}


def reaches(points: list[tuple[int, float]], goal: float) -> float:
    """Forwards at which a piecewise linear curve that starts above the goal first is there; infinite if never."""
    for (before, high), (forwards, loss) in itertools.pairwise(points):
        if loss <= goal:
            return before + (forwards - before) * (high - goal) / (high - loss)
    return math.inf

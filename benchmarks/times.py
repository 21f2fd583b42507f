"""How long runs will take: by the ledger where it has such runs, else by the guesses of the grid's YAML."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import ledger
from benchmarks.runs import Run

FIXED = 15.0  # seconds to load, tokenise, check and capture, before anything was measured
USUAL = 30.0  # seconds for 4,000 forwards of a task without a guess


def estimate(run: Run, rows: Sequence[ledger.Row], config: dict[str, Any]) -> float:
    """Seconds that a run is expected to take, loading included.

    Args:
        run: The run.
        rows: The ledger: of runs as long of this stage and task, those of the same method count, without any those of all.
        config: The grid; ``seconds`` has a guess for 4,000 forwards by task, ``cost`` of a method is a factor on it.
    """
    kind = (run.stage, run.task, run.forwards_asked)
    like = [row for row in rows if row.get("wall") and (row["stage"], row["task"], row["forwards_asked"]) == kind]
    same = [row["wall"] for row in like if row["method"] == run.method]
    method = config["methods"][run.method]
    if not same and "cost" not in method:
        same = [row["wall"] for row in like if "cost" not in config["methods"].get(row["method"], {"cost": 1})]
    if same:
        return statistics.median(same)
    return FIXED + config.get("seconds", {}).get(run.task, USUAL) * run.forwards_asked / 4000 * method.get("cost", 1)


def clock(seconds: float) -> str:
    """Minutes, or hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"

"""Is there something to learn on a task? First-order Adam on the same rows must beat a prediction that does not look at the prompt."""

from __future__ import annotations

import math
from typing import NamedTuple

from benchmarks import ledger

MARGIN = 0.05  # nats


class Headroom(NamedTuple):
    """What Adam reaches on a task, and what it has to beat.

    Args:
        adam: Its loss, bias-corrected where the task has candidates, mean over seeds.
        reference: Loss of the constant predictor; of the untrained model where the task has no candidates.
        constant: Whether the reference is the constant predictor.
    """

    adam: float
    reference: float
    constant: bool

    @property
    def there(self) -> bool:
        """Whether Adam is better by :data:`MARGIN`."""
        return self.reference - self.adam > MARGIN


def headroom(rows: list[ledger.Row], method: str = "adam") -> dict[str, Headroom]:
    """By task, for tasks on which that method has ended."""
    found: dict[str, list[Headroom]] = {}
    untrained = {}
    for row in rows:
        if row["method"] != method or row["stage"] != "final":
            continue
        if row["forwards"] == 0:
            untrained[row["task"], row["seed"]] = row["loss"]
        if row["final"]:
            constant = row.get("constant_loss") is not None
            reference = row["constant_loss"] if constant else untrained.get((row["task"], row["seed"]), math.nan)
            adam = row["loss_corrected"] if "loss_corrected" in row else row["loss"]
            found.setdefault(row["task"], []).append(Headroom(adam, reference, constant))
    return {
        task: Headroom(sum(h.adam for h in several) / len(several), sum(h.reference for h in several) / len(several), several[0].constant)
        for task, several in found.items()
    }

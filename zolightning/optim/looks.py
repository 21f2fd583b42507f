"""Looks at weights whose latest moves wait beside them."""

from __future__ import annotations

from collections.abc import Callable

from zolightning.spaces.base import Space
from zolightning.spaces.interrupts import uninterrupted


class Looks:
    """When deferred moves were brought into the weights because somebody looked; 16-bit weights are rounded there once more."""

    def __init__(self) -> None:
        #: Step of the latest look: nothing has waited there.
        self.latest = 0
        #: Those of steps that are repeated from a record.
        self.recorded: frozenset[int] = frozenset()
        #: Called with the step of each look that is not on record.
        self.sink: Callable[[int], None] | None = None

    def take(self, space: Space, seed: int, step: int, repeating: bool) -> None:
        """Bring the moves in.

        Args:
            space: Whose weights.
            seed: Seed of the run.
            step: Steps so far.
            repeating: Whether the coming step is on record.

        Raises:
            RuntimeError: It is, without a look here.
        """
        if self.latest == step:
            return
        if repeating and step not in self.recorded:
            raise RuntimeError(
                f"the recorded steps were made without a look at the weights of step {step}: resume with the old intervals of "
                "validation and checkpoints, or from the checkpoint alone"
            )
        with uninterrupted():  # what is done is on record
            space.settle(seed, step)
            if self.sink is not None and step not in self.recorded:
                self.sink(step)
            self.latest = step

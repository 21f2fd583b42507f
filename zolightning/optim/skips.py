"""Steps whose loss is not finite: counted on the device, looked at without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

_EVERY = 32  # steps between two looks


class SkippedSteps:
    """Counts steps that were skipped, in all and in a row.

    Args:
        counts: int64 ``[2]``: in all, in a row; written in place.
        limit: How many in a row are too many.
    """

    def __init__(self, counts: Tensor, limit: int) -> None:
        self.counts, self.limit = counts, limit
        self._seen: tuple[int, Tensor, torch.cuda.Event] | None = None

    def count(self, valid: Tensor) -> None:
        """Take note of a step, on the device.

        Args:
            valid: 0-d bool; false: skipped.
        """
        missed = (~valid).to(torch.int64)
        self.counts.add_(missed)
        self.counts[1].mul_(missed)

    def too_many(self, step: int) -> tuple[int, int] | None:
        """Look now and then; on a GPU the answer is that of the last look.

        Args:
            step: Steps so far.

        Returns:
            How many in a row and at which step, if they are too many.
        """
        if step % min(_EVERY, self.limit):
            return None
        if self.counts.device.type != "cuda":
            row = int(self.counts[1])
            return (row, step) if row >= self.limit else None
        found = None
        if self._seen is not None and self._seen[2].query():
            row = int(self._seen[1][1])
            found = (row, self._seen[0]) if row >= self.limit else None
            self._seen = None
        if self._seen is None:
            copy, event = torch.empty(2, dtype=torch.int64, pin_memory=True), torch.cuda.Event()
            copy.copy_(self.counts, non_blocking=True)
            event.record()
            self._seen = step, copy, event
        return found

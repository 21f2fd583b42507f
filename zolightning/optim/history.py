"""What the latest steps did, in a ring on the device: written without waiting, brought to the host when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 1024  # steps that the ring holds


class Row(NamedTuple):
    """One step; with the base weights and the seed it says how the weights moved.

    Args:
        step: Number of the step.
        valid: Whether it moved the weights; false where a loss was not finite.
        lr: Learning rate, exactly as the device had it.
        coefficients: One per direction, exactly.
        losses: One per probe, exactly.
        scales: Standard deviation per block: float32, shape ``[blocks]``, on the CPU.
    """

    step: int
    valid: bool
    lr: float
    coefficients: tuple[float, ...]
    losses: tuple[float, ...]
    scales: Tensor


class History:
    """A ring of the latest steps.

    :meth:`write` consists of device operations alone and may be part of a CUDA graph. Whoever sets :attr:`sink` gets every row: before the
    ring overflows it is emptied into the sink. Without one the oldest rows are overwritten.

    Args:
        queries: Coefficients of a step.
        probes: Losses of a step.
        scales: Scales of the first step, shape ``[blocks]``.
        constant: Whether they are those of every step; they are then kept once.
        dtype: Type of learning rate, coefficients and losses: float32 or float64.
        size: Steps that the ring holds.

    Example:
        >>> optimizer.history.sink = rows.extend
        >>> optimizer.step(closure)
        >>> optimizer.history.drain(optimizer.steps)
    """

    def __init__(self, queries: int, probes: int, scales: Tensor, constant: bool, dtype: torch.dtype, size: int = SIZE) -> None:
        device = scales.device
        self.queries, self.size = queries, size
        #: Takes the rows that :meth:`drain` brings to the host.
        self.sink: Callable[[Sequence[Row]], None] | None = None
        self._first = 0  # the oldest step that was not drained
        self._marks = torch.zeros(size, 2, dtype=torch.int64, device=device)  # step, valid
        self._figures = torch.zeros(size, 1 + queries + probes, dtype=dtype, device=device)  # learning rate, coefficients, losses
        self._scales = torch.zeros(1 if constant else size, scales.numel(), dtype=torch.float32, device=device)
        self._scales[0] = scales

    def write(self, clock: Tensor, lr: Tensor, coefficients: Tensor, losses: Tensor, valid: Tensor, scales: Tensor) -> None:
        """Take note of a step, on the device.

        Args:
            clock: Number of the step: 0-d int64.
            lr: 0-d.
            coefficients: ``[queries]``.
            losses: ``[probes]``.
            valid: 0-d bool.
            scales: ``[blocks]``.
        """
        place = (clock % self.size).view(1)
        self._marks.index_copy_(0, place, torch.stack([clock, valid.to(torch.int64)])[None])
        self._figures.index_copy_(0, place, torch.cat([lr.view(1), coefficients, losses])[None].to(self._figures.dtype))
        if len(self._scales) > 1:
            self._scales.index_copy_(0, place, scales[None])

    def restart(self, step: int) -> None:
        """Forget all rows; the next one is that of ``step``."""
        self._first = step

    def make_room(self, step: int) -> None:
        """Called before each step: empties a full ring into the sink.

        Args:
            step: Steps so far.
        """
        if step - self._first >= self.size:
            if self.sink is not None:
                self.drain(step)
            else:
                self._first = step - self.size + 1

    def drain(self, steps: int) -> list[Row]:
        """Bring the rows that were not drained yet to the host, which waits for the device, and hand them to the sink.

        Args:
            steps: Steps so far: rows of later ones are not finished.

        Raises:
            RuntimeError: The ring does not hold the steps that it should.
        """
        numbers = range(self._first, steps)
        if not numbers:
            return []
        places = torch.tensor([number % self.size for number in numbers], device=self._marks.device)
        marks, figures = self._marks[places].tolist(), self._figures[places].tolist()
        scales = self._scales.cpu() if len(self._scales) == 1 else self._scales[places].cpu()
        rows = []
        for i, (number, (step, valid), values) in enumerate(zip(numbers, marks, figures, strict=True)):
            if step != number:
                raise RuntimeError(f"the record of step {number} holds step {step}: steps were taken that the optimizer did not count")
            split = 1 + self.queries
            rows.append(Row(step, bool(valid), values[0], tuple(values[1:split]), tuple(values[split:]), scales[i % len(scales)]))
        self._first = steps
        if self.sink is not None:
            self.sink(rows)
        return rows

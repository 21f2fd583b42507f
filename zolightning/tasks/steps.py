"""The order of the batches, without state to save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch.utils.data import Sampler


class StepKeyedSampler(Sampler[list[int]]):
    """Batches of row numbers; batch ``t`` of a run is a pure function of ``(seed, t)``.

    So a run that resumes in the middle of an epoch needs no saved data state. Each epoch is a new permutation; its
    last, incomplete batch is dropped.

    Args:
        n: Number of rows.
        batch_size: Rows a batch.
        seed: Seed of the order.
        step: Batch that the next iteration starts with, or a function that returns it. An iteration ends with
            its epoch.

    Raises:
        ValueError: If a batch holds more rows than there are, or none.

    Example:
        >>> StepKeyedSampler(n=1000, batch_size=4, seed=0).batch(70) == StepKeyedSampler(1000, 4).batch(70)
        True
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0, step: int | Callable[[], int] = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is not positive")
        if batch_size > n:
            raise ValueError(f"batch_size {batch_size} is larger than the number of training rows, {n}")
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.step = step

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.n // self.batch_size

    def batch(self, t: int) -> list[int]:
        """Row numbers of batch ``t``, counted from the start of the run."""
        epoch, place = divmod(t, len(self))
        return _order(self.n, self.seed, epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from ``step`` to the end of its epoch."""
        first = self.step() if callable(self.step) else self.step
        for t in range(first, (first // len(self) + 1) * len(self)):
            if not callable(self.step):
                self.step = t + 1
            yield self.batch(t)


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 7919 + epoch)).tolist()
    return order

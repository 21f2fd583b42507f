"""Several tasks in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning
from torch.utils.data import DataLoader, IterableDataset

from .data import Batch, TaskDataModule


class MultiTaskDataModule(lightning.LightningDataModule):
    """The training batches of several tasks in turn; a batch says by its ``task`` which one it is from.

    Batch ``t`` is batch ``t // K`` of task ``t % K``, so each task's rows come in the order of a run of its own.

    Args:
        sources: The tasks.

    Raises:
        ValueError: There is no task.

    Example:
        >>> data = MultiTaskDataModule([TaskDataModule("sst2"), TaskDataModule("rte")])
    """

    def __init__(self, sources: list[TaskDataModule]) -> None:
        super().__init__()
        if not sources:
            raise ValueError("sources is empty: name at least one task")
        self.sources = sources

    def setup(self, stage: str | None = None) -> None:
        """Load, choose and tokenise the rows of all tasks."""
        for source in self.sources:
            source.trainer = self.trainer
            source.setup(stage)

    def train_batch(self, t: int) -> Batch:
        """Batch ``t`` of the run on the CPU: the same that the Trainer sees at step ``t``.

        Args:
            t: Number of the batch, from 0, counted over all tasks and epochs.
        """
        turn, task = divmod(t, len(self.sources))
        return {**self.sources[task].train_batch(turn), "task": task}  # type: ignore[dict-item]

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, from the Trainer's current step on, without end."""
        return DataLoader(_Turns(self.train_batch, lambda: self.trainer.global_step if self.trainer else 0), batch_size=None)


class _Turns(IterableDataset[Any]):
    def __init__(self, batch: Callable[[int], Batch], step: Callable[[], int]) -> None:
        self._batch, self._step = batch, step

    def __iter__(self) -> Iterator[Batch]:
        step = self._step()
        while True:
            yield self._batch(step)
            step += 1

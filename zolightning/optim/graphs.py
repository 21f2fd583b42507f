"""The whole step as CUDA graphs, one for each shape of batch: no launches from the host, no waiting."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zolightning.objectives.base import BoundObjective
from zolightning.objectives.batch import Batch, bucket, with_padding

_TORCH = os.path.dirname(torch.__file__)
#: Runs a step of a bound objective on the device; with ``live`` false everything but the change.
Compute = Callable[[BoundObjective, bool], tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    bound: BoundObjective  # its batch is what is read; kept, since graphs are found by the identity of objective and model
    outputs: tuple[Tensor, ...]


class StepGraphs:
    """Captures the step for each shape of batch that comes along, and replays it.

    Batches are padded on the left to few widths, see :func:`zolightning.objectives.batch.bucket`.

    Args:
        compute: The step on the device.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._captured: dict[Any, _Captured] = {}
        self._pool: Any = None

    def rehearse(self, bound: BoundObjective) -> str:
        """Run a step without the change of the weights; where it waits for the device, empty if it does not."""
        static = bound.to(with_padding(_static(bound).batch))
        self._warm_up(static)
        before, asked = torch.cuda.get_sync_debug_mode(), torch.cuda.is_current_stream_capturing
        torch.cuda.set_sync_debug_mode("error")
        torch.cuda.is_current_stream_capturing = lambda: True  # models ask, and leave out what a capture forbids
        try:
            self._compute(static, False)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_TORCH)]
            return f"{frames[-1].filename}, line {frames[-1].lineno}"
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.is_current_stream_capturing = asked
        return ""

    def run(self, bound: BoundObjective, settings: Any) -> tuple[Tensor, ...]:
        """Replay the step on a batch.

        Args:
            bound: Objective and batch.
            settings: Whatever else is fixed in a graph; other settings are captured anew.

        Returns:
            Copies of what the step returns.
        """
        batch = bucket(bound.batch)
        key = (id(bound.objective), id(bound.model), bound.micro_batch_size, settings, _shape(batch))
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(_static(bound))
        for name, value in captured.bound.batch.items():
            if isinstance(value, Tensor):
                value.copy_(batch[name], non_blocking=True)
        captured.graph.replay()
        return tuple(output.clone() for output in captured.outputs)

    def clear(self) -> None:
        """Forget all steps; they are captured anew where they are run again."""
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()
        self._pool = None

    def _capture(self, bound: BoundObjective) -> _Captured:
        self._warm_up(bound)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as that which watches over NCCL, may talk to the device meanwhile.
        stream, _ = streams(torch.cuda.current_device())
        with _no_garbage(), torch.cuda.graph(graph, self._pool, stream, "thread_local"):
            outputs = self._compute(bound, True)
        return _Captured(graph, bound, outputs)

    def _warm_up(self, bound: BoundObjective) -> None:
        """Compile and load every kernel."""
        stream, _ = streams(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute(bound.to(with_padding(bound.batch)), False)
        torch.cuda.current_stream().wait_stream(stream)


@cache
def streams(device: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """A stream for captures, and one for what runs beside them and goes first. All optimizers of a process share them.

    Each stream that multiplies matrices gets 32 MiB for good.

    Args:
        device: Number of the GPU.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-1)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect garbage now and not inside: what is freed there, an older graph for example, spoils the capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _static(bound: BoundObjective) -> BoundObjective:
    """The objective on a batch of its own, at an address that stays."""
    batch = bucket(bound.batch)
    return bound.to({name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()})


def _shape(batch: Batch) -> tuple[Any, ...]:
    return tuple((name, (*v.shape, v.dtype) if isinstance(v, Tensor) else v) for name, v in sorted(batch.items()))

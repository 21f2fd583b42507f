"""Replicas: processes with equal weights that share the probes of every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from zolightning.estimators.base import Probe
from zolightning.objectives.base import BoundObjective, total
from zolightning.objectives.batch import cut, size
from zolightning.optim.checksum import checksum
from zolightning.spaces.base import Space

Mode = Literal["rows", "directions"]
#: What to read in a probe: given the number of signs in the forward, one tensor for each.
Read = Callable[[int], Sequence[Tensor]]


class ReplicaLostError(RuntimeError):
    """Another replica is gone, or silent for too long."""


class Replicas:
    r"""The processes of ``torch.distributed``'s default group, as a :class:`~zolightning.ZOOptimizer` uses them.

    All hold the same weights, see the same batch and make the same update. What they divide is the evaluation of the probes, and only
    losses cross the wire. They are put together in the order of one process, and summed as it would:

    * ``rows``: each evaluates every probe on its rows of the batch. What crosses is the loss and weight of each row.
    * ``directions``: each evaluates some of the queries on the whole batch. What crosses is one loss a probe, and the run has the bits
      of one process.

    Parts are as even as can be. Nothing about them is saved, so a run may go on with another number of replicas.

    Args:
        mode: What is divided.
        check_every: Steps between two comparisons of the weights, bit by bit. The first step is always compared.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> optimizer.replicas = Replicas("directions")  # after torch.distributed.init_process_group()
    """

    def __init__(self, mode: Mode = "rows", check_every: int = 200) -> None:
        if mode not in ("rows", "directions"):
            raise ValueError(f"mode={mode!r} must be 'rows' or 'directions'")
        if check_every < 1:
            raise ValueError(f"check_every={check_every} must be at least 1")
        self.mode: Mode = mode
        self.check_every = check_every
        #: Bytes of losses that each process gives to each other one in a step, padding included.
        self.payload = 0
        self._checked = False

    @property
    def rank(self) -> int:
        """Number of this process."""
        return dist.get_rank()

    @property
    def world(self) -> int:
        """Number of processes."""
        return dist.get_world_size()

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may replay what they tell each other."""
        return dist.get_backend() == "nccl"

    def shares(self, count: int) -> list[range]:
        """``count`` rows or queries in as many consecutive parts as there are processes.

        Raises:
            ValueError: There are too few.
        """
        if count < self.world:
            what, other = ("rows in a batch", "directions") if self.mode == "rows" else ("queries in a step", "rows")
            raise ValueError(f"{self.world} replicas in mode={self.mode} cannot divide {count} {what}: use fewer devices or mode={other}")
        return [range(*bounds) for bounds in pairwise(count * part // self.world for part in range(self.world + 1))]

    def own(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The part of a closure that this process evaluates: its rows, or in mode ``directions`` all.

        Raises:
            ValueError: The closure does not tell its rows apart, or there are too few.
        """
        if self.mode == "directions":
            return closure
        rows = self.shares(_rows(closure))[self.rank]
        assert isinstance(closure, BoundObjective)
        return closure.to(cut(closure.batch, rows.start, rows.stop))

    def losses(
        self, probes: Sequence[Probe], closure: Callable[[], Any], evaluate: Callable[[Sequence[Probe], Read], Tensor], read: Read
    ) -> Tensor:
        """Losses of the probes on the whole batch, the same on every process.

        Args:
            probes: The estimator's probes.
            closure: The loss, or an objective bound to the batch.
            evaluate: Runs probes and stacks what was read in each.
            read: Reads the losses of the closure.

        Returns:
            Shape ``[probes]``.
        """
        if self.mode == "rows":
            own: Any = self.own(closure)
            rows = evaluate(probes, lambda copies: torch.stack(own.rows(copies), dim=1).unbind())  # [probes, 2, own rows]
            loss_sum, weight = self._exchange(rows, [len(part) for part in self.shares(_rows(closure))]).unbind(dim=1)
            return total(loss_sum, weight)
        queries = list(dict.fromkeys(probe.query for probe in probes))
        parts = [[n for n, probe in enumerate(probes) if queries.index(probe.query) in share] for share in self.shares(len(queries))]
        losses = self._exchange(evaluate([probes[n] for n in parts[self.rank]], read), [len(part) for part in parts])
        order = [n for part in parts for n in part]
        return torch.stack([losses[order.index(n)] for n in range(len(probes))])

    def _exchange(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        self.payload = values[..., :1].numel() * max(counts) * values.element_size()
        return self.gather(values, counts)

    def gather(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Lay the parts of all processes side by side.

        Args:
            values: This one's part, shape ``[..., counts[rank]]``.
            counts: How many entries each has.

        Returns:
            Shape ``[..., sum(counts)]``, in the order of ranks; the same bits everywhere.

        Raises:
            ReplicaLostError: A process did not take part.
        """
        padded = F.pad(values, (0, max(counts) - values.shape[-1])).contiguous()
        parts = padded.new_empty(self.world, *padded.shape).unbind()
        with contact():
            dist.all_gather(list(parts), padded)
        return torch.cat([part[..., :count] for part, count in zip(parts, counts, strict=True)], dim=-1)

    def agree(self, obstacle: str, device: torch.device) -> str:
        """An obstacle that any process has found; empty where none has.

        Args:
            obstacle: What this one has found.
            device: Where to exchange it.
        """
        found = self.gather(torch.tensor([bool(obstacle)], dtype=torch.uint8, device=device), [1] * self.world)
        return obstacle or ("another replica has found a reason against it" if bool(found.any()) else "")

    def check(self, step: int, space: Space, closure: Callable[[], Any]) -> None:
        """Compare weights and batches of all processes, at the first step and every ``check_every`` from then on.

        Args:
            step: Steps so far.
            space: Its blocks are compared.
            closure: Its batch is, where it has one.

        Raises:
            RuntimeError: They differ.
        """
        if self._checked and step % self.check_every:
            return
        self._checked = True
        space.catch_up()
        batch: Mapping[str, Any] = getattr(closure, "batch", {})
        tensors = [value for _, value in sorted(batch.items()) if isinstance(value, Tensor)]
        own = torch.stack([checksum(part).to(space.device) for part in ([block.tensor for block in space.blocks], tensors)])
        found = self.gather(own[:, None], [1] * self.world).tolist()
        for name, values in zip(("weights", "batches"), found, strict=True):
            for rank, value in enumerate(values):
                if value != values[0]:
                    raise RuntimeError(
                        f"replicas disagree at step {step}: the {name} of replica 0 have the checksum {values[0] % (1 << 64):016x}, "
                        f"those of replica {rank} {value % (1 << 64):016x}"
                    )


def _rows(closure: Callable[[], Any]) -> int:
    """Rows of a closure's batch."""
    if not isinstance(closure, BoundObjective):
        raise ValueError("replicas in mode=rows need an objective bound to a batch, this closure is none: use mode=directions")
    return size(closure.batch)


@contextmanager
def contact() -> Iterator[None]:
    """Tell in one line that another process is gone, whatever the backend says.

    Raises:
        ReplicaLostError: It is.
    """
    try:
        yield
    except RuntimeError as error:
        silent = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        what = "does not answer in time" if silent else "is gone"
        raise ReplicaLostError(f"another replica {what}; the run goes on from its last checkpoint, with any number of replicas") from error

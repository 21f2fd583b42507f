"""Tensors that one pass treats together: one launch per device and type on a GPU, one after the other elsewhere."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from zolightning.kernels import plain
from zolightning.noise import GaussianNoise, Noise, RademacherNoise

if TYPE_CHECKING:
    from zolightning.kernels.fused import Table

_T = TypeVar("_T")
#: Devices on which the Triton kernels run.
FUSED_DEVICES = {"cuda"} if importlib.util.find_spec("triton") is not None else set()


@dataclass(frozen=True, eq=False)
class Update:
    """An update along one direction: what :meth:`Pack.update` takes.

    Args:
        amounts: The factors ``a``: ``[1, slots]``.
        noises: One for each slot.
        shrink: Rate of weight decay: 0-d.
        valid: 0-d bool.
        clock: The step: 0-d int64.
    """

    amounts: Tensor
    noises: Sequence[Noise]
    shrink: Tensor
    valid: Tensor
    clock: Tensor


class Pack:
    """Some tensors, their block ids, and their places in the array of amounts.

    Args:
        tensors: The weights; contiguous for :meth:`update`. They must stay where they are.
        ids: 32-bit block id of each.
        slots: Place of each in the amounts that the passes take; without them 0, 1, 2, ...
        starts: Where each begins in its block, in elements, if it is a part: multiples of 8.
    """

    def __init__(
        self, tensors: Sequence[Tensor], ids: Sequence[int], slots: Sequence[int] | None = None, starts: Sequence[int] | None = None
    ) -> None:
        self.tensors, self.ids = tuple(tensors), tuple(ids)
        self.slots = tuple(slots) if slots is not None else tuple(range(len(self.tensors)))
        self.starts = tuple(starts) if starts is not None else (0,) * len(self.tensors)

    @cached_property
    def _tables(self) -> list[tuple[list[int], Table]]:
        """For each device and type: which tensors, and their table."""
        from zolightning.kernels.fused import Table

        groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for index, tensor in enumerate(self.tensors):
            groups[tensor.device, tensor.dtype].append(index)

        def of(column: Sequence[_T], group: list[int]) -> list[_T]:
            return [column[index] for index in group]

        return [
            (group, Table(of(self.tensors, group), of(self.ids, group), of(self.slots, group), of(self.starts, group)))
            for group in groups.values()
        ]

    def fusable(self, noises: Sequence[Sequence[Noise]]) -> bool:
        """Whether the kernels draw the very same numbers: known noise, unchanged by a subclass, keyed by these blocks.

        Args:
            noises: ``[queries][tensors]``.
        """
        if not all(t.device.type in FUSED_DEVICES and t.dtype != torch.float64 and t.is_contiguous() for t in self.tensors):
            return False
        kind, first = type(noises[0][0]), noises[0][0]
        return kind in (GaussianNoise, RademacherNoise) and all(
            type(noise) is kind and noise == replace(first, key=replace(first.key, query=first.key.query + q, block=block))
            for q, row in enumerate(noises)
            for noise, block in zip(row, self.ids, strict=True)
        )

    def check_places(self) -> None:
        """Make sure that the kernels will find the tensors.

        Raises:
            RuntimeError: A tensor was moved to other memory.
        """
        if "_tables" in self.__dict__ and not all(table.still_there() for _, table in self._tables):
            raise RuntimeError("the weights were moved to other memory after the optimizer was made; make the optimizer afterwards")

    def materialise(self, amounts: Tensor, noises: Sequence[Noise], clock: Tensor | None = None, copies: int = 1) -> list[Tensor]:
        r"""Perturbed copies :math:`W_i + a_i z_i`, rounded once to the nearest value of the weights' type.

        Args:
            amounts: The factors ``a``: float32 (float64 for float64 weights), on the weights' device; the slots point into it.
            noises: Where each ``z_i`` comes from.
            clock: The step as the kernels read it: 0-d int64 on the device; without it the noises' own.
            copies: 1, or 2 for :math:`W_i - a_i z_i` as well.

        Returns:
            New tensors ``[copies, *shape]`` of the same types.
        """
        if self.fusable([noises]):
            from zolightning.kernels import fused

            self.check_places()
            out: dict[int, Tensor] = {}
            for indices, table in self._tables:
                own = amounts.to(table.device, torch.float32)
                made = fused.materialise(table, own, noises[indices[0]], _clock(clock, noises[0], table.device), copies)
                out.update(zip(indices, made, strict=True))
            return [out[index] for index in range(len(self.tensors))]
        return [
            plain.materialise(tensor, amounts[slot].to(tensor.device, plain.compute_dtype(tensor.dtype)), noise, copies, start)
            for tensor, slot, noise, start in zip(self.tensors, self.slots, noises, self.starts, strict=True)
        ]

    def update(
        self, amounts: Tensor, noises: Sequence[Sequence[Noise]], shrink: Tensor | float, valid: Tensor, clock: Tensor | None = None
    ) -> None:
        r"""In-place step :math:`W_i \leftarrow W_i + (\sum_q a_{q,i} z_{q,i} - r W_i)`; 16-bit weights are rounded stochastically.

        Args:
            amounts: The factors ``a``: ``[queries, slots]``, float32 (float64 for float64 weights).
            noises: ``[queries][tensors]``, of one step, with consecutive queries.
            shrink: The rate ``r`` of weight decay; 0 for none. It is not a factor ``1 - r``, which float32 would round to 1.
            valid: 0-d bool; false leaves the weights as they are.
            clock: As for :meth:`materialise`.

        The rounding bits belong to the first query's noise.
        """
        if self.fusable(noises):
            from zolightning.kernels import fused

            self.check_places()
            for indices, table in self._tables:
                own, rate = amounts.to(table.device, torch.float32).contiguous(), scalar(shrink, table.device, torch.float32)
                of_one = [row[indices[0]] for row in noises]
                fused.update(table, own, of_one, rate, valid.to(table.device), _clock(clock, noises[0][0], table.device))
            return
        for index, (tensor, slot, start) in enumerate(zip(self.tensors, self.slots, self.starts, strict=True)):
            compute = plain.compute_dtype(tensor.dtype)
            own, rate = amounts[:, slot].to(tensor.device, compute), scalar(shrink, tensor.device, compute)
            plain.update(tensor, own, [row[index] for row in noises], rate, valid.to(tensor.device), start)

    def make(self, late: Update) -> None:
        """:meth:`update`, of all slots that are tensors here."""
        self.update(late.amounts, [[late.noises[slot] for slot in self.slots]], late.shrink, late.valid, late.clock)

    def advance(self, late: Update, amounts: Tensor, noises: Sequence[Noise], clock: Tensor | None = None, copies: int = 1) -> list[Tensor]:
        """:meth:`make` and :meth:`materialise`, with the same bits; in one pass over the weights where the kernels know both.

        Args:
            late: The update.
            amounts: As for :meth:`materialise`, and all that follow.
            noises: Where each ``z_i`` comes from.
            clock: The step that is shown.
            copies: 1 or 2.
        """
        step = late.noises[0].key.step
        of_its_step = [replace(noise, key=replace(noise.key, step=step)) for noise in noises]
        if not self.fusable([noises]) or [late.noises[slot] for slot in self.slots] != of_its_step:
            self.make(late)
            return self.materialise(amounts, noises, clock, copies)
        from zolightning.kernels import fused

        self.check_places()
        out: dict[int, Tensor] = {}
        for indices, table in self._tables:
            device, own = table.device, amounts.to(table.device, torch.float32)
            moves, rate = late.amounts[0].to(device, torch.float32), late.shrink.to(device, torch.float32)
            shown = _clock(clock, noises[0], device)
            made = fused.advance(table, moves, rate, late.valid.to(device), late.clock.to(device), own, noises[indices[0]], shown, copies)
            out.update(zip(indices, made, strict=True))
        return [out[index] for index in range(len(self.tensors))]


def rows(weight: Tensor, ids: Tensor, amounts: Tensor, slot: int, noise: Noise, clock: Tensor | None, copies: int) -> Tensor:
    """Rows of a perturbed matrix, without the rest of it.

    Args:
        weight: ``[N, H]``.
        ids: Which rows: int64, any shape. With two copies its second half (of the first dimension) are rows of ``W - a z``.
        amounts: As for :meth:`Pack.materialise`.
        slot: Place of the matrix in the amounts.
        noise: Where ``z`` comes from.
        clock: As for :meth:`Pack.materialise`.
        copies: 1 or 2.

    Returns:
        ``[*ids.shape, H]``.
    """
    pack = Pack([weight], [noise.key.block], [slot])
    if pack.fusable([[noise]]):
        from zolightning.kernels import fused

        own = amounts.to(weight.device, torch.float32)
        return fused.rows(weight, ids, own, slot, noise, _clock(clock, noise, weight.device), copies)
    whole = pack.materialise(amounts, [noise], clock, copies)[0]
    return torch.cat([copy[part] for copy, part in zip(whole, ids.chunk(copies), strict=True)])


def drawn(noise: Noise, numel: int, device: torch.device) -> Tensor:
    """The noise itself: the first ``numel`` elements, flat, float32; fewer than 2**27 of them."""
    zeros = torch.zeros(1, numel, device=device)
    return rows(zeros, torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, device=device), 0, noise, None, 1)[0]


def fold(weight: Tensor, left: Tensor, basis: Tensor, shrink: Tensor, noise: Noise, clock: Tensor | None) -> None:
    r"""In-place step :math:`W \leftarrow W + (B A - r W)` of a matrix; 16-bit weights are rounded stochastically.

    Args:
        weight: ``W``: ``[N, H]``, contiguous.
        left: ``B``: ``[N, R]``, float32 (float64 for float64 weights).
        basis: ``A``: ``[R, H]``, of the weight's type.
        shrink: The rate ``r`` of weight decay: 0-d.
        noise: Its key has the rounding bits.
        clock: As for :meth:`Pack.materialise`.
    """
    if Pack([weight], [noise.key.block]).fusable([[noise]]):
        from zolightning.kernels import fused

        fused.fold(weight, left, basis, shrink.to(weight.device, torch.float32), noise, _clock(clock, noise, weight.device))
    else:
        plain.fold(weight, left, basis, shrink.to(weight.device, plain.compute_dtype(weight.dtype)), noise.key)


def scalar(value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A 0-d tensor, made without waiting for the device."""
    return value.to(device, dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


def _clock(clock: Tensor | None, noise: Noise, device: torch.device) -> Tensor:
    return torch.full((), noise.key.step, dtype=torch.int64, device=device) if clock is None else clock.to(device)

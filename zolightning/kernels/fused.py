"""The passes over the weights as Triton kernels: noise drawn in registers, many tensors in one launch, nothing read from the host.

A :class:`Table` holds on the device where the tensors lie. The step is read from the device too, so that a captured CUDA graph
draws new noise at every replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zolightning.kernels.noise import _INTERPRETED, draw, place, rounding_bits, weave
from zolightning.kernels.rounding import HALF_INFINITY, HALF_NAN, TO_HALF
from zolightning.noise import Noise

_TO_HALF = tl.constexpr(TO_HALF)
_HALF_INFINITY, _HALF_NAN = tl.constexpr(HALF_INFINITY), tl.constexpr(HALF_NAN)
_OCTETS = 256  # octets (8 elements) that a program works on at a time
_PARTS = 4  # how often it does so, where there is enough work for all programs; what it looks up first then counts less
_MANY = 1 << 21  # octets that are enough
_WARPS = 8
_REGISTERS = 128  # for a thread with four octets: none is spilled, where the compiler would take up to 160
_SCALARS = ["k0", "k1", "stream", "queries", "slot", "block"]  # values that change must not recompile
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_POINTER, _NUMEL, _ID, _SLOT, _FIRST, _OFFSET, _PROGRAM, _COLUMNS = (tl.constexpr(i) for i in range(8))
_QUERY = tl.constexpr(16)  # streams from one query to the next


@triton.jit
def _stochastic_round(value, bits, TYPE: tl.constexpr):
    if tl.float16 == TYPE:
        raw = (value * _TO_HALF).to(tl.uint32, bitcast=True)
        half = tl.minimum(((raw & 0x7FFFFFFF) + (bits & 0x1FFF)) >> 13, _HALF_INFINITY)
        half = tl.where(value != value, _HALF_NAN, half)
        out = (half | ((raw >> 16) & 0x8000)).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        out = ((value.to(tl.uint32, bitcast=True) + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return out


@triton.jit
def _nearest(value, TYPE: tl.constexpr):
    if _INTERPRETED and tl.bfloat16 == TYPE:  # the interpreter's own conversion truncates
        raw = value.to(tl.uint32, bitcast=True)
        value = ((raw + 0x7FFF + ((raw >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(TYPE)


@triton.jit
def _u32(value):
    return value.to(tl.int64).to(tl.uint32)


@triton.jit
def _place(rows, segments, OCTETS: tl.constexpr, PARTS: tl.constexpr):
    """The row of the table that this program works on, its first octet, and how many elements are left from there."""
    row = rows + tl.load(segments + tl.program_id(0)) * _COLUMNS
    first = (tl.program_id(0) - tl.load(row + _PROGRAM)) * (OCTETS * PARTS)
    return row, first, tl.minimum(tl.load(row + _NUMEL) - first * 8, OCTETS * PARTS * 8).to(tl.int32)


@triton.jit
def _pointer(row, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + _POINTER).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + first * 8


@triton.jit
def _elements(OCTETS: tl.constexpr, SHARED: tl.constexpr):
    """The elements of the octets that a program works on at a time, in the order of the noise."""
    i = tl.arange(0, OCTETS * 8)
    return tl.max_contiguous(tl.multiple_of(place(i // 8, OCTETS, SHARED) * 8 | i & 7, 8), 8)


@triton.jit
def _load(pointer, at, left):
    """Whole octets as vectors; what is left of the last one element by element."""
    whole = left // 8 * 8
    w = tl.load(pointer + at, mask=at < whole, other=0.0)
    if whole != left:
        w = tl.where(at < whole, w, tl.load(pointer + whole + (at & 7), mask=_last(at, left), other=0.0))
    return w.to(tl.float32)


@triton.jit
def _store(pointer, at, left, value):
    whole = left // 8 * 8
    tl.store(pointer + at, value, mask=at < whole)
    if whole != left:
        tl.store(pointer + at, value, mask=_last(at, left))


@triton.jit
def _last(at, left):
    """Where the last octet, which is not whole, has elements. Told by place in the octet: numbers of elements would fill registers."""
    return (at // 8 == left // 8) & (at % 8 < left % 8)


@triton.jit
def _show(
    plus, minus, at, left, w, amount, k0, k1, first, block, step, stream,
    GAUSSIAN: tl.constexpr, SHARED: tl.constexpr, TYPE: tl.constexpr, COPIES: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """Store ``w + a z``, and with two copies ``w - a z``."""
    u = weave(*draw(_u32(k0), _u32(k1), first, block, step, _u32(stream), amount, GAUSSIAN, SHARED, OCTETS))
    filled = (left + 7) // 8 * 8  # each copy has room for whole octets
    tl.store(plus + at, _nearest(w + u, TYPE), mask=at < filled)
    if COPIES == 2:
        tl.store(minus + at, _nearest(w - u, TYPE), mask=at < filled)


@triton.jit
def _moved(
    w, amounts, stride, queries, rate, k0, k1, first, block, step, stream,
    GAUSSIAN: tl.constexpr, SHARED: tl.constexpr, TYPE: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """The weights after a step, rounded to their type."""
    t0 = tl.zeros([OCTETS], tl.float32)  # one sum a place in the octet: a sum over whole octets would be laid out otherwise
    t1, t2, t3, t4, t5, t6, t7 = t0, t0, t0, t0, t0, t0, t0
    for q in range(queries):
        a, of_query = tl.load(amounts + q * stride), _u32(stream + q * _QUERY)
        z0, z1, z2, z3, z4, z5, z6, z7 = draw(_u32(k0), _u32(k1), first, block, step, of_query, a, GAUSSIAN, SHARED, OCTETS)
        t0, t1, t2, t3, t4, t5, t6, t7 = t0 + z0, t1 + z1, t2 + z2, t3 + z3, t4 + z4, t5 + z5, t6 + z6, t7 + z7
    total = weave(t0, t1, t2, t3, t4, t5, t6, t7)
    w = w + (total - w * rate)
    if tl.float32 != TYPE:
        w = _stochastic_round(w, rounding_bits(_u32(k0), _u32(k1), first, block, step, _u32(stream), SHARED, OCTETS), TYPE)
    return w


@triton.jit(do_not_specialize=_SCALARS)
def _materialise(
    out, rows, segments, amounts, clock, k0, k1, stream,
    GAUSSIAN: tl.constexpr, SHARED: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, COPIES: tl.constexpr, OCTETS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    row, first, left = _place(rows, segments, OCTETS, PARTS)
    weight, at = _pointer(row, first, TYPE, ALIGNED), _elements(OCTETS, SHARED)
    octet = _u32(tl.load(row + _FIRST) + first)
    block, step, amount = _u32(tl.load(row + _ID)), _u32(tl.load(clock)), tl.load(amounts + tl.load(row + _SLOT))
    plus = out + tl.load(row + _OFFSET) * (8 * COPIES) + first * 8
    minus = plus + (tl.load(row + _NUMEL) + 7) // 8 * 8
    for part in range(PARTS):
        shift, here, own = part * (OCTETS * 8), left - part * (OCTETS * 8), octet + part * OCTETS
        if here > 0:
            w = _load(weight + shift, at, here)
            _show(
                plus + shift, minus + shift, at, here, w, amount, k0, k1, own, block, step, stream, GAUSSIAN, SHARED, TYPE, COPIES, OCTETS
            )


@triton.jit(do_not_specialize=_SCALARS)
def _update(
    rows, segments, amounts, stride, valid, shrink, clock, k0, k1, stream, queries,
    GAUSSIAN: tl.constexpr, SHARED: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, OCTETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    if tl.load(valid):
        row, first, left = _place(rows, segments, OCTETS, PARTS)
        weight, at, rate = _pointer(row, first, TYPE, ALIGNED), _elements(OCTETS, SHARED), tl.load(shrink)
        block, step, of_slot = _u32(tl.load(row + _ID)), _u32(tl.load(clock)), amounts + tl.load(row + _SLOT)
        octet = _u32(tl.load(row + _FIRST) + first)
        for part in range(PARTS):
            shift, here, own = part * (OCTETS * 8), left - part * (OCTETS * 8), octet + part * OCTETS
            if here > 0:
                w = _load(weight + shift, at, here)
                w = _moved(w, of_slot, stride, queries, rate, k0, k1, own, block, step, stream, GAUSSIAN, SHARED, TYPE, OCTETS)
                _store(weight + shift, at, here, w)


@triton.jit(do_not_specialize=_SCALARS)
def _advance(
    out, rows, segments, moves, valid, shrink, before, amounts, clock, k0, k1, stream,
    GAUSSIAN: tl.constexpr, SHARED: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, COPIES: tl.constexpr, OCTETS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    row, first, left = _place(rows, segments, OCTETS, PARTS)
    weight, at, slot = _pointer(row, first, TYPE, ALIGNED), _elements(OCTETS, SHARED), tl.load(row + _SLOT)
    octet = _u32(tl.load(row + _FIRST) + first)
    block, step, earlier = _u32(tl.load(row + _ID)), _u32(tl.load(clock)), _u32(tl.load(before))
    live, rate, amount = tl.load(valid), tl.load(shrink), tl.load(amounts + slot)
    plus = out + tl.load(row + _OFFSET) * (8 * COPIES) + first * 8
    minus = plus + (tl.load(row + _NUMEL) + 7) // 8 * 8
    for part in range(PARTS):
        shift, here, own = part * (OCTETS * 8), left - part * (OCTETS * 8), octet + part * OCTETS
        if here > 0:
            w = _load(weight + shift, at, here)
            moved = _moved(w, moves + slot, 0, 1, rate, k0, k1, own, block, earlier, stream, GAUSSIAN, SHARED, TYPE, OCTETS)
            _store(weight + shift, at, tl.where(live, here, 0), moved)
            w = tl.where(live, moved.to(tl.float32), w)  # not a branch: it would be taken in nearly every step
            _show(
                plus + shift, minus + shift, at, here, w, amount, k0, k1, own, block, step, stream, GAUSSIAN, SHARED, TYPE, COPIES, OCTETS
            )


@triton.jit(do_not_specialize=_SCALARS)
def _rows(
    out, weight, ids, amounts, clock, slot, block, k0, k1, stream, half, width,
    GAUSSIAN: tl.constexpr, TYPE: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(ids + row) * width
    first = start // 8 + tl.program_id(1) * OCTETS
    at = first * 8 + tl.arange(0, OCTETS * 8)
    mine = (at >= start) & (at < start + width)
    amount = tl.load(amounts + slot) * tl.where(row < half, 1.0, -1.0)  # a product: in Triton 3.6 ``-u`` is ``0 - u``, which has no -0
    u = weave(*draw(_u32(k0), _u32(k1), _u32(first), _u32(block), _u32(tl.load(clock)), _u32(stream), amount, GAUSSIAN, False, OCTETS))
    w = tl.load(weight + at, mask=mine).to(tl.float32)
    tl.store(out + row * width + (at - start), _nearest(w + u, TYPE), mask=mine)


@triton.jit(do_not_specialize=[*_SCALARS, "numel", "width"])
def _fold(
    weight, left, basis, shrink, clock, block, k0, k1, stream, numel, width,
    RANK: tl.constexpr, TYPE: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * OCTETS
    row, within = first * 8 // width, (first * 8 % width).to(tl.int32) + tl.arange(0, OCTETS * 8)
    mine = first * 8 + tl.arange(0, OCTETS * 8) < numel
    down, column = within // width.to(tl.int32), within % width.to(tl.int32)
    w = tl.load(weight + first * 8 + tl.arange(0, OCTETS * 8), mask=mine, other=0.0).to(tl.float32)
    total = tl.zeros([OCTETS * 8], tl.float32)
    for j in range(RANK):
        b = tl.load(left + (row + down) * RANK + j, mask=mine, other=0.0)
        a = tl.load(basis + j * width + column, mask=mine, other=0.0).to(tl.float32)
        total = total + b * a
    w = w + (total - w * tl.load(shrink))
    if tl.float32 != TYPE:
        bits = rounding_bits(_u32(k0), _u32(k1), _u32(first), _u32(block), _u32(tl.load(clock)), _u32(stream), False, OCTETS)
        w = _stochastic_round(w, bits, TYPE)
    tl.store(weight + first * 8 + tl.arange(0, OCTETS * 8), w, mask=mine)


class Table:
    """Where some tensors of one device and type lie, for the kernels.

    Args:
        tensors: Contiguous; they must stay where they are.
        ids: 32-bit block id of each.
        slots: Place of each in the array of amounts.
        starts: Where each begins in its block, in elements: multiples of 8.
    """

    def __init__(self, tensors: Sequence[Tensor], ids: Sequence[int], slots: Sequence[int], starts: Sequence[int]) -> None:
        self.tensors = tuple(tensors)
        self.device, self.dtype = tensors[0].device, tensors[0].dtype
        self.addresses = [t.data_ptr() for t in tensors]
        self.aligned = all(address % 16 == 0 for address in self.addresses)
        #: Whether octets can share signs, of which the generator gives 128 at once. Four octets of float32 would fill the registers.
        self.shareable = self.dtype != torch.float32 and all(start % 128 == 0 for start in starts)
        sizes = torch.tensor([t.numel() for t in tensors])
        octets = -(-sizes // 8)
        #: Octets of each tensor, the last one filled up; those of all.
        self.octets, self.length = octets.tolist(), int(octets.sum())
        self.parts = _PARTS if self.length >= _MANY else 1
        programs = -(-octets // (_OCTETS * self.parts))
        self.programs = int(programs.sum())
        named = [self.addresses, sizes.tolist(), ids, slots, [start // 8 for start in starts]]
        columns = [*(torch.tensor(column) for column in named), octets.cumsum(0) - octets, programs.cumsum(0) - programs]
        self.rows = torch.stack(columns, dim=1).to(self.device)
        #: Row of the table for each program.
        self.segments = torch.repeat_interleave(torch.arange(len(tensors), dtype=torch.int32), programs).to(self.device)

    def still_there(self) -> bool:
        """Whether the tensors are where the table says."""
        return [t.data_ptr() for t in self.tensors] == self.addresses


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the weights'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _signed(*words: int) -> tuple[int, ...]:
    """Words as signed 32-bit integers: an argument that changes its width would compile the kernel again."""
    return tuple(word - (1 << 32) if word >> 31 else word for word in words)


def _key(noise: Noise) -> tuple[int, ...]:
    return _signed(noise.key.seed & 0xFFFFFFFF, noise.key.seed >> 32, noise.key.query * 16 + int(noise.purpose))


def materialise(table: Table, amounts: Tensor, noise: Noise, clock: Tensor, copies: int) -> list[Tensor]:
    """``W + a z`` of every tensor of a table, and with two copies ``W - a z`` behind it.

    Args:
        table: The tensors.
        amounts: float32; the table's slots point into it.
        noise: One of the tensors' noises: they differ by block alone.
        clock: The step: 0-d int64.
        copies: 1 or 2.

    Returns:
        New tensors of shape ``[copies, *shape]``, views of one allocation.
    """
    out = torch.empty(table.length * 8 * copies, dtype=table.dtype, device=table.device)
    with _on(table.device):
        _materialise[(table.programs,)](
            out, table.rows, table.segments, amounts, clock, *_key(noise), COPIES=copies, **_form(table, noise)
        )  # fmt: skip
    return _views(table, out, copies)


def advance(
    table: Table, moves: Tensor, shrink: Tensor, valid: Tensor, before: Tensor, amounts: Tensor, noise: Noise, clock: Tensor, copies: int
) -> list[Tensor]:
    """The step of one direction, as :func:`update` makes it, then :func:`materialise`, in one pass.

    Args:
        table: The tensors.
        moves: Amounts of the step: float32; the table's slots point into it.
        shrink: Rate of weight decay: 0-d float32.
        valid: 0-d bool; false leaves the tensors as they are.
        before: Number of the step: 0-d int64. The noises of both differ by it alone.
        amounts: As for :func:`materialise`, and all that follow.
        noise: One of the tensors' noises.
        clock: The step that is shown.
        copies: 1 or 2.

    Returns:
        As :func:`materialise`.
    """
    out = torch.empty(table.length * 8 * copies, dtype=table.dtype, device=table.device)
    with _on(table.device):
        _advance[(table.programs,)](
            out, table.rows, table.segments, moves, valid, shrink, before, amounts, clock, *_key(noise), COPIES=copies,
            **_form(table, noise),
        )  # fmt: skip
    return _views(table, out, copies)


def _form(table: Table, noise: Noise) -> dict[str, Any]:
    """What a pass over a table is compiled for. A thread works on an octet at a time, or on four if they share what is drawn."""
    shared = noise.fused == "rademacher" and table.shareable
    return {
        "GAUSSIAN": noise.fused == "gaussian", "SHARED": shared, "TYPE": _TYPES[table.dtype], "ALIGNED": table.aligned, "OCTETS": _OCTETS,
        "PARTS": table.parts, "num_warps": _WARPS // 4 if shared else _WARPS, "maxnreg": _REGISTERS if shared else None,
        "enable_fp_fusion": False,
    }  # fmt: skip


def _views(table: Table, out: Tensor, copies: int) -> list[Tensor]:
    """Each tensor's part of what a pass has made."""
    views, start = [], 0
    for tensor, octets in zip(table.tensors, table.octets, strict=True):
        part = out[start : start + copies * octets * 8].view(copies, octets * 8)[:, : tensor.numel()]
        views.append(part.unflatten(1, tensor.shape) if tensor.dim() else part[:, 0])
        start += copies * octets * 8
    return views


def update(table: Table, amounts: Tensor, noises: Sequence[Noise], shrink: Tensor, valid: Tensor, clock: Tensor) -> None:
    """The step of every tensor of a table, in place.

    Args:
        table: The tensors.
        amounts: float32, ``[queries, slots]``, rows contiguous.
        noises: One tensor's noise in each query; the queries are consecutive.
        shrink: Rate of weight decay: 0-d float32.
        valid: 0-d bool; false leaves everything as it is.
        clock: The step: 0-d int64.
    """
    with _on(table.device):
        _update[(table.programs,)](
            table.rows, table.segments, amounts, amounts.stride(0), valid, shrink, clock, *_key(noises[0]), len(noises),
            **_form(table, noises[0]),
        )  # fmt: skip


def rows(weight: Tensor, ids: Tensor, amounts: Tensor, slot: int, noise: Noise, clock: Tensor, copies: int) -> Tensor:
    """Rows of ``W + a z``; with two copies the second half of ``ids`` takes rows of ``W - a z``.

    Args:
        weight: ``[N, H]``, contiguous.
        ids: int64, any shape; with two copies an even number of entries along the first dimension.
        amounts: float32; ``slot`` points into it.
        slot: Place of the weight's amount.
        noise: The weight's noise.
        clock: The step: 0-d int64.
        copies: 1 or 2.

    Returns:
        ``[*ids.shape, H]``.
    """
    ids, width = ids.contiguous(), weight.shape[1]
    out = torch.empty(*ids.shape, width, dtype=weight.dtype, device=weight.device)
    octets = min(triton.next_power_of_2(width // 8 + 2), _OCTETS)
    with _on(weight.device):
        _rows[(ids.numel(), triton.cdiv(width // 8 + 2, octets))](
            out, weight, ids, amounts, clock, slot, *_signed(noise.key.block), *_key(noise), ids.numel() // copies, width,
            GAUSSIAN=noise.fused == "gaussian", TYPE=_TYPES[weight.dtype], OCTETS=octets, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def fold(weight: Tensor, left: Tensor, basis: Tensor, shrink: Tensor, noise: Noise, clock: Tensor) -> None:
    """``weight <- weight + (left @ basis - shrink * weight)`` in place; see :func:`zolightning.kernels.fold`.

    Args:
        weight: ``[N, H]``, contiguous.
        left: ``[N, R]``, float32.
        basis: ``[R, H]``, of the weight's type.
        shrink: Rate of weight decay: 0-d float32.
        noise: Its key has the rounding bits.
        clock: The step: 0-d int64.
    """
    with _on(weight.device):
        _fold[(triton.cdiv(weight.numel(), _OCTETS * 8),)](
            weight, left, basis, shrink, clock, *_signed(noise.key.block), *_key(noise), weight.numel(), weight.shape[1],
            RANK=left.shape[1], TYPE=_TYPES[weight.dtype], OCTETS=_OCTETS, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip

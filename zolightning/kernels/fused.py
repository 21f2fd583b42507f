"""The two passes over the weights as Triton kernels: one read and one write, noise drawn in registers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zolightning.kernels.noise import draw, rounding_bits
from zolightning.kernels.rounding import HALF_TINY
from zolightning.noise import Key, Noise

_HALF_TINY = tl.constexpr(HALF_TINY)
_OCTETS = 128  # one octet (8 elements) a thread of a 4-warp program
_SCALARS = ["k0", "k1", "block", "step", "query", "queries", "numel", "shrink"]  # values that change must not recompile


@triton.jit
def _stochastic_round(value, bits, HALF: tl.constexpr):
    raw = value.to(tl.uint32, bitcast=True)
    if HALF:
        normal = ((raw + (bits & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        scaled = tl.abs(value) * 16777216.0
        floor = tl.floor(scaled)
        up = (bits.to(tl.float32) * 0.0000152587890625) < (scaled - floor)
        tiny = (floor + up.to(tl.float32)) * 5.9604644775390625e-08
        tiny = (tiny.to(tl.uint32, bitcast=True) | (raw & 0x80000000)).to(tl.float32, bitcast=True)
        value = tl.where(tl.abs(value) < _HALF_TINY, tiny, normal)
    else:
        value = ((raw + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _nearest(value, BF16: tl.constexpr):
    if BF16:  # spelled out: the interpreter's own conversion truncates
        raw = value.to(tl.uint32, bitcast=True)
        value = ((raw + 0x7FFF + ((raw >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _u32(value):
    return value.to(tl.int64).to(tl.uint32)


@triton.jit(do_not_specialize=_SCALARS)
def _materialise(
    out, weight, amount, k0, k1, block, step, query, numel,
    GAUSSIAN: tl.constexpr, BF16: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    octet = tl.program_id(0) * OCTETS + tl.arange(0, OCTETS)
    at = tl.program_id(0).to(tl.int64) * (OCTETS * 8) + tl.arange(0, OCTETS * 8)
    z = draw(_u32(k0), _u32(k1), octet.to(tl.uint32), _u32(block), _u32(step), _u32(query), GAUSSIAN)
    w = tl.load(weight + at, mask=at < numel).to(tl.float32)
    w = _nearest(w + z * tl.load(amount), BF16)
    tl.store(out + at, w.to(out.dtype.element_ty), mask=at < numel)


@triton.jit(do_not_specialize=_SCALARS)
def _update(
    weight, amounts, stride, valid, shrink, k0, k1, block, step, query, queries, numel,
    GAUSSIAN: tl.constexpr, ROUND: tl.constexpr, HALF: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    if tl.load(valid):
        octet = (tl.program_id(0) * OCTETS + tl.arange(0, OCTETS)).to(tl.uint32)
        at = tl.program_id(0).to(tl.int64) * (OCTETS * 8) + tl.arange(0, OCTETS * 8)
        total = tl.zeros([OCTETS * 8], tl.float32)
        for q in range(queries):
            z = draw(_u32(k0), _u32(k1), octet, _u32(block), _u32(step), _u32(query + q), GAUSSIAN)
            total = total + z * tl.load(amounts + q * stride)
        w = tl.load(weight + at, mask=at < numel).to(tl.float32)
        w = w + (total - w * shrink)
        if ROUND:
            w = _stochastic_round(w, rounding_bits(_u32(k0), _u32(k1), octet, _u32(block), _u32(step), _u32(query)), HALF)
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=at < numel)


def _grid(numel: int) -> tuple[int]:
    return (triton.cdiv(numel, _OCTETS * 8),)


def _on(weight: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the weights'."""
    return torch.cuda.device(weight.device) if weight.is_cuda else nullcontext()


def _key(key: Key) -> tuple[int, int, int, int, int]:
    """The key as signed 32-bit integers: an argument that changes its width would compile the kernel again."""
    words = (key.seed & 0xFFFFFFFF, key.seed >> 32, key.block, key.step, key.query)
    return tuple(word - (1 << 32) if word >> 31 else word for word in words)  # type: ignore[return-value]


def materialise(weight: Tensor, amount: Tensor, noise: Noise) -> Tensor:
    """Triton form of :func:`zolightning.kernels.materialise`."""
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    with _on(weight):
        _materialise[_grid(weight.numel())](
            out, weight, amount, *_key(noise.key), weight.numel(),
            GAUSSIAN=noise.fused == "gaussian", BF16=weight.dtype == torch.bfloat16, OCTETS=_OCTETS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def update(weight: Tensor, amounts: Tensor, noises: Sequence[Noise], shrink: float, valid: Tensor) -> None:
    """Triton form of :func:`zolightning.kernels.update`; the queries must be consecutive."""
    with _on(weight):
        _update[_grid(weight.numel())](
            weight, amounts, amounts.stride(0), valid, shrink, *_key(noises[0].key), len(noises), weight.numel(),
            GAUSSIAN=noises[0].fused == "gaussian", ROUND=weight.dtype != torch.float32, HALF=weight.dtype == torch.float16,
            OCTETS=_OCTETS, enable_fp_fusion=False,
        )  # fmt: skip

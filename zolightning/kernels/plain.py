"""The passes over the weights in plain torch: any device, any dtype, any noise. The Triton forms have the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zolightning.kernels.rounding import stochastic_round
from zolightning.noise import Key, Noise, rounding_bits

_FOLD = 1 << 22  # elements that a fold works on at a time


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which weights of ``dtype`` are perturbed and moved: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def materialise(weight: Tensor, amount: Tensor, noise: Noise, copies: int = 1, first: int = 0) -> Tensor:
    """``W + a z``, and with two copies ``W - a z`` behind it: a new tensor ``[copies, *shape]``; ``first``: see :class:`Pack`."""
    out = torch.empty(copies, *weight.shape, dtype=weight.dtype, device=weight.device)
    flat, source, compute = out.view(copies, -1), weight.reshape(-1), compute_dtype(weight.dtype)
    for start, stop, z in noise.chunks(weight.numel(), weight.device, first):
        base, shift = source[start:stop].to(compute), z.to(compute) * amount
        flat[0, start:stop] = base + shift
        if copies == 2:
            flat[1, start:stop] = base - shift
    return out


def update(weight: Tensor, amounts: Tensor, noises: Sequence[Noise], shrink: Tensor, valid: Tensor, first: int = 0) -> None:
    """``weight <- weight + (sum_q amounts[q] * z_q - shrink * weight)`` in place; see :class:`Pack`."""
    if weight.device.type == "cpu" and not bool(valid):
        return
    compute = compute_dtype(weight.dtype)
    target = weight.view(-1)
    for chunk in zip(*(noise.chunks(weight.numel(), weight.device, first) for noise in noises), strict=True):
        start, stop, _ = chunk[0]
        total = torch.zeros(stop - start, dtype=compute, device=weight.device)
        for amount, (_, _, z) in zip(amounts, chunk, strict=True):
            total = total + z.to(compute) * amount
        old = target[start:stop]
        moved = old.to(compute) + (total - old.to(compute) * shrink)
        if weight.dtype in (torch.bfloat16, torch.float16):
            moved = stochastic_round(moved, rounding_bits(noises[0].key, first + start, stop - start, weight.device), weight.dtype)
        target[start:stop] = torch.where(valid, moved.to(weight.dtype), old)  # a look at the flag would wait for the device


def fold(weight: Tensor, left: Tensor, basis: Tensor, shrink: Tensor, key: Key) -> None:
    """``weight <- weight + (left @ basis - shrink * weight)`` in place; see :func:`zolightning.kernels.fold`."""
    compute, (height, width) = compute_dtype(weight.dtype), weight.shape
    rows = max(1, _FOLD // width)
    for start in range(0, height, rows):
        target = weight[start : start + rows]
        old, total = target.to(compute), torch.zeros(target.shape, dtype=compute, device=weight.device)
        for j in range(left.shape[1]):  # one after another, as the kernel does
            total = total + left[start : start + rows, j, None] * basis[j].to(compute)
        moved = old + (total - old * shrink)
        if weight.dtype in (torch.bfloat16, torch.float16):
            bits = rounding_bits(key, start * width, moved.numel(), weight.device).view(moved.shape)
            moved = stochastic_round(moved, bits, weight.dtype)
        target.copy_(moved)

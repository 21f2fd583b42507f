"""The smallest probe distance that weights of a given size and type can show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zolightning.blocks import Block

_MEDIAN_NORMAL = 0.6745  # median of |z|


def resolvable_eps(blocks: Sequence[Block], scales: Tensor) -> float:
    r"""Probe distance at which about half of all elements change.

    An element changes when :math:`\epsilon \sigma |z|` passes half of the spacing of floating-point numbers at the weight.

    Args:
        blocks: What moves.
        scales: Standard deviation per block, shape ``[blocks]``.
    """
    needed, sizes = [], []
    for block, scale in zip(blocks, scales.tolist(), strict=True):
        if not scale:  # it does not move
            continue
        typical = block.tensor.detach().abs().float().median()
        spacing = torch.finfo(block.dtype).eps * 2.0 ** torch.floor(torch.log2(typical.clamp_min(torch.finfo(block.dtype).tiny)))
        needed.append(float(spacing) / 2 / _MEDIAN_NORMAL / scale)
        sizes.append(block.numel)
    half, total = sum(sizes) / 2, 0
    for value, size in sorted(zip(needed, sizes, strict=True)):
        total += size
        if total >= half:
            return value
    raise ValueError("no blocks")

"""Controls: what a learned policy must beat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from zolightning.policies.layout import BlockInfo
from zolightning.policies.pert_nn import PertNN
from zolightning.policies.table import Table
from zolightning.policies.uniform import Uniform


def uniform() -> Uniform:
    """The same scale everywhere."""
    return Uniform()


def untrained(seed: int = 42) -> PertNN:
    """The published policy before its training; the released ones have hardly left it."""
    return PertNN(seed=seed)


def upper_half(blocks: Sequence[BlockInfo]) -> Table:
    """Only the layers ``>= L / 2`` and norms outside of the layers move; embeddings and head do not.

    Raises:
        ValueError: No block is in a layer.
    """
    layers = [block.layer for block in blocks if block.layer is not None]
    if not layers:
        raise ValueError("no block is in a layer, so there is no upper half")
    half = (max(layers) + 1) / 2
    chosen = [block.kind == "norm" if block.layer is None else block.layer >= half for block in blocks]
    return Table.of(blocks, torch.tensor(chosen, dtype=torch.float32))


def closed_form(
    blocks: Sequence[BlockInfo],
    gradient: Mapping[str, float],
    fisher: Mapping[str, float],
    damping: float = 0.0,
    floor: float = 0.0,
) -> Table:
    r"""Scales from statistics: blocks with much gradient for their curvature move more.

    .. math:: \sigma_i^2 \propto \max\Bigl(\frac{\max(G_i, 0)}{F_i + \lambda\, d_i \sum_j F_j / \sum_j d_j},\ \phi \max_j(\cdot)\Bigr)

    Args:
        blocks: The blocks.
        gradient: ``G_i``, the squared norm of the block's mean gradient, by name; debiased estimates may be negative.
        fisher: ``F_i``, the mean squared norm of its per-example gradients, by name; a stand-in for the trace of the Hessian.
        damping: The factor ``lambda``: how much of an average block of that size is added to ``F_i``.
        floor: The share ``phi`` of the largest ratio below which none falls.

    Raises:
        ValueError: A block has no statistics, one is not finite or ``F_i`` is negative, an argument is out of range, or no block
            has a positive ratio.
    """
    if not (damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"damping={damping} must be finite and not negative")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} must be between 0 and 1")
    for name in (block.name for block in blocks):
        if name not in gradient or name not in fisher:
            raise ValueError(f"block {name!r} has no statistics")
        if not (math.isfinite(gradient[name]) and math.isfinite(fisher[name]) and fisher[name] >= 0):
            raise ValueError(f"block {name!r} has G={gradient[name]} and F={fisher[name]}")
    typical = damping * math.fsum(fisher[block.name] for block in blocks) / sum(block.numel for block in blocks)
    ratios = []
    for block in blocks:
        curvature = fisher[block.name] + typical * block.numel
        ratios.append(max(gradient[block.name], 0.0) / curvature if curvature > 0 else 0.0)
    largest = max(ratios)
    if largest <= 0:
        raise ValueError("no block has a positive gradient statistic")
    return Table.of(blocks, torch.tensor([max(ratio / largest, floor) for ratio in ratios]).sqrt())

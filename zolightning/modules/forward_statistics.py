r"""Statistics of groups of blocks from forward passes alone, for models whose backward pass does not fit.

Give every group ``g`` a random variance :math:`s_g` and probe along :math:`u`, whose blocks are :math:`\sqrt{s_g}\, z_i`. The
coefficient of row ``b``, :math:`c_b = (\ell_b^+ - \ell_b^-) / 2\epsilon`, is :math:`\langle u, h_b\rangle`, so

.. math:: \mathbb E\, c_b^2 = \sum_g s_g F_g, \qquad \mathbb E\, c_a c_b = \sum_g s_g G_g \ (a \ne b), \qquad
          \mathbb E\, \bar c^2 = \sum_g s_g M_g ,

and least squares over many probes with different ``s`` tell the groups apart. **It is expensive**: a share of :math:`1/K` has to be seen
in numbers that scatter as much as their own mean, times the noise of a batch. About

.. math:: N = \left(\frac{K r}{\delta}\right)^2, \qquad r = \frac{\sum_g M_g}{\sum_g G_g}

pairs of probes reach a relative error :math:`\delta` of ``G``. So pool by kind and depth, and use large batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zolightning.modules.statistics import BlockStatistics
from zolightning.objectives.base import Objective
from zolightning.objectives.batch import Batch
from zolightning.optim.precision import exact_float32
from zolightning.policies.layout import BlockInfo, depths
from zolightning.samplers.base import Direction, Sampler
from zolightning.spaces import Space

log = logging.getLogger("zolightning")

_SPREAD = 0.9  # variances of groups are 1 +- this
_PILOT = 32  # pairs after which the cost is known well enough to be told


def group_blocks(blocks: Sequence[BlockInfo], parts: int = 2) -> list[str]:
    """Name of each block's group: its kind, and which part of the depth it lies in.

    Args:
        blocks: The blocks.
        parts: Parts of the depth.

    Example:
        >>> group_blocks([BlockInfo("layers.0.mlp.up_proj.weight"), BlockInfo("layers.1.mlp.up_proj.weight"), BlockInfo("lm_head.weight")])
        ['up 1/2', 'up 2/2', 'head']
    """
    if parts < 1:
        raise ValueError(f"parts={parts} must be at least 1")
    places = [None if depth is None else min(int(depth * parts), parts - 1) + 1 for depth in depths(blocks)]
    return [block.kind if place is None else f"{block.kind} {place}/{parts}" for block, place in zip(blocks, places, strict=True)]


def pairs_needed(groups: int, noise_ratio: float, error: float = 0.3) -> int:
    r"""Pairs of probes for a relative error of ``G``, :math:`(K r / \delta)^2`.

    Args:
        groups: The number ``K``.
        noise_ratio: ``r``, the second moment of a batch's gradient over the squared norm of the true one.
        error: The relative error.

    Example:
        >>> pairs_needed(14, 1.2)
        3136
    """
    return math.ceil(round((groups * noise_ratio / error) ** 2, 6))


def forward_statistics(
    space: Space,
    objective: Objective,
    batches: Iterable[Batch],
    sampler: Sampler,
    groups: Sequence[str],
    eps: float = 1e-3,
    seed: int = 0,
) -> BlockStatistics:
    """Statistics from one pair of probes per batch. Says what an error of 30 % would cost as soon as the noise is known.

    Args:
        space: The blocks; its model computes.
        objective: The loss.
        batches: On the weights' device, of at least two rows each; as many as pairs are wanted.
        sampler: Gives the noise; bound to the space.
        groups: Name of each block's group.
        eps: Probe distance.
        seed: Seed of directions and variances.

    Returns:
        Statistics of the blocks: a group's value, split among its blocks by their sizes.

    Raises:
        ValueError: There are fewer pairs than groups, or not as many group names as blocks.
    """
    if len(groups) != len(space.blocks):
        raise ValueError(f"{len(groups)} group names for {len(space.blocks)} blocks")
    names = list(dict.fromkeys(groups))
    index = torch.tensor([names.index(group) for group in groups])
    generator = torch.Generator().manual_seed(seed)
    variances, seen, rows = list[Tensor](), list[Tensor](), 0
    for step, batch in enumerate(batches):
        variance = 1 + _SPREAD * (2.0 * torch.randint(0, 2, (len(names),), generator=generator) - 1)
        direction = Direction(sampler, seed, step, 0, variance.sqrt()[index].to(space.device, space.compute_dtype))
        c = _coefficients(space, objective, batch, direction, eps).double().cpu()
        n = len(c)
        variances.append(variance.double())
        seen.append(torch.stack([(c.sum().square() - c.square().sum()) / (n * (n - 1)), c.mean().square(), c.square().mean()]))
        rows += n
        if step + 1 == _PILOT:
            _tell_cost(len(names), torch.stack(seen))
    if len(seen) < len(names):
        raise ValueError(f"{len(seen)} pairs of probes cannot tell {len(names)} groups apart")
    found = torch.linalg.lstsq(torch.stack(variances), torch.stack(seen)).solution  # [groups, 3]
    sizes = torch.tensor([block.numel for block in space.blocks], dtype=torch.float64)
    shares = sizes / torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, sizes)[index]
    gradient, batch_moment, fisher = (found[index] * shares[:, None]).unbind(1)
    blocks = tuple(block.name for block in space.blocks)
    return BlockStatistics(blocks, gradient, batch_moment.clamp_min(0), fisher.clamp_min(0), rows, rows // len(seen))


@torch.no_grad()
def _coefficients(space: Space, objective: Objective, batch: Batch, direction: Direction, eps: float) -> Tensor:
    """Each row's coefficient, of its share in the batch loss: shape ``[B]``."""
    sides = []
    with exact_float32():
        for sign in (1, -1):
            with space.probe(direction, sign * eps):
                loss, weight = objective.rows(space.model, batch)
            sides.append(loss * (len(loss) / weight.sum()))
    return (sides[0] - sides[1]) / (2 * eps)


def _tell_cost(groups: int, seen: Tensor) -> None:
    signal, noise = float(seen[:, 0].mean()), float(seen[:, 1].mean())
    if signal <= 0:
        log.warning(
            "forward statistics: after %d pairs the gradient is still below its noise; larger batches or a backward pass", len(seen)
        )
        return
    ratio = noise / signal
    log.warning(
        "forward statistics: an error of 30 %% for %d groups takes about %s pairs of probes (noise ratio %.1f)",
        groups, f"{pairs_needed(groups, ratio):,}", ratio,
    )  # fmt: skip

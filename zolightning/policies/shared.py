r"""The ratio of signal to curvature that several tasks share.

A block's own :math:`G_i / F_i` on one task is noisy, and a plain mean over tasks is the ratio of the task with the largest gradient. What
a new task can be expected to have is found by making the mean of :math:`\log \rho_t` large, :math:`\rho_t = \sum_i p_i G_{t,i} / \sum_i
p_i F_{t,i}` being the signal for a unit of noise: tasks then count alike, however large their gradients are. Its slope at equal scales is

.. math:: g_i = \operatorname{mean}_t \frac{G_{t,i} / F_t}{\max(G_t, 0) / F_t + 1 / N_t}, \qquad
          f_i = \operatorname{mean}_t \frac{F_{t,i}}{F_t},

with :math:`G_t, F_t` the sums over the blocks. An estimate from :math:`N_t` rows cannot tell a ratio from zero below about
:math:`1 / N_t`; a task without more than that says little. Blocks then borrow from their neighbours, the same kind in layers close by:

.. math:: r_i = \frac{g_i + \frac{a}{n} \bar r_i}{f_i + \frac{a}{n}}, \qquad
          \bar r_i = \frac{\sum_j k_{ij} g_j}{\sum_j k_{ij} f_j}, \qquad \sigma_i^2 \propto \max(r_i, 0)^q .
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zolightning.policies.layout import BlockInfo, depths
from zolightning.policies.table import Table

_OTHER_KIND = 0.1  # what a block of another kind in the same layer weighs as a neighbour


def shared_ratio(
    blocks: Sequence[BlockInfo],
    gradient: Tensor,
    fisher: Tensor,
    rows: Tensor,
    power: float = 3.0,
    borrow: float = 1.0,
    width: float = 0.05,
) -> Table:
    """Scales from the statistics of several tasks, or of several places on the way of their training.

    Args:
        blocks: The blocks.
        gradient: ``G``, debiased and so perhaps negative: shape ``[tasks, blocks]``.
        fisher: ``F``: shape ``[tasks, blocks]``.
        rows: ``N``, the rows of each task: shape ``[tasks]``.
        power: ``q``: 1 makes the scales as flat as the ratio, larger ones concentrate them.
        borrow: ``a``: how much the neighbours count beside a block of average curvature.
        width: How far neighbours reach, as a share of the model's depth.

    Raises:
        ValueError: Shapes differ, a number is not finite, an argument is out of range, or no block has signal.

    Example:
        >>> blocks = [BlockInfo(f"layers.{i}.mlp.up_proj.weight") for i in range(3)]
        >>> g = torch.tensor([[1.0, 2.0, 2.0], [0.0, 300.0, 900.0]])  # the second task has large gradients, yet counts as much
        >>> table = shared_ratio(blocks, g, torch.full((2, 3), 1000.0), torch.tensor([800, 800]))
        >>> table.values.argmax().item()
        2
    """
    check_shape_of_ratio(power, borrow, width)
    if gradient.shape != fisher.shape or gradient.shape != (len(rows), len(blocks)):
        raise ValueError(
            f"statistics of shapes {tuple(gradient.shape)} and {tuple(fisher.shape)} for {len(rows)} tasks, {len(blocks)} blocks"
        )
    if not bool(gradient.isfinite().all() & fisher.isfinite().all()):
        raise ValueError("statistics are not finite")
    gradient, fisher = gradient.double(), fisher.double()
    unit = fisher.sum(1, keepdim=True)
    signal = gradient / unit
    signal = (signal / (signal.sum(1).clamp_min(0.0) + 1 / rows.double())[:, None]).mean(0)
    curvature = (fisher / unit).mean(0)
    near = neighbours(blocks, width)
    share = borrow / len(blocks)
    ratio = (signal + share * (near @ signal) / (near @ curvature).clamp_min(1e-30)) / (curvature + share).clamp_min(1e-30)
    ratio = ratio.clamp_min(0.0)
    if not float(ratio.max()) > 0:
        raise ValueError("the tasks share no signal: no block has a positive ratio")
    return Table.of(blocks, (ratio / ratio.max()).pow(power / 2).float())


def check_shape_of_ratio(power: float, borrow: float, width: float) -> None:
    """Refuse arguments of :func:`shared_ratio` that are out of range.

    Raises:
        ValueError: One is.
    """
    for name, value, least in (("power", power, 0.0), ("borrow", borrow, 0.0), ("width", width, 1e-6)):
        if not (value >= least and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be finite and at least {least:g}")


def neighbours(blocks: Sequence[BlockInfo], width: float) -> Tensor:
    """How much each block says of each: a Gaussian of the distance in depth; blocks outside of the layers speak for themselves alone.

    Args:
        blocks: The blocks.
        width: Standard deviation, as a share of the depth.
    """
    places = depths(blocks)
    depth = torch.tensor([math.nan if place is None else place for place in places], dtype=torch.float64)
    near = (-(depth[:, None] - depth).square() / (2 * width**2)).exp()  # NaN outside of the layers
    kinds = [block.kind for block in blocks]
    same = torch.tensor([[1.0 if own == other else _OTHER_KIND for other in kinds] for own in kinds], dtype=torch.float64)
    near = (near * same).nan_to_num(0.0)
    return near + torch.diag(depth.isnan().double())

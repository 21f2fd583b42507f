r"""Signal for curvature as a function of a block's features and a number of its own, learnt over tasks.

A block's own :math:`\rho_{t,i} = G_i / F_i` on a task is noisy, and differs from task to task. What a new task can be expected to have is

.. math:: \rho_{t,i} \approx s_t\, v_i, \qquad v_i = f_i + \kappa\, (m_i - f_i), \qquad f_i = e^{w^\top x_i},

where ``f`` is fitted to all tasks by least squares with a ridge on ``w``, ``m`` are the blocks' own means, and :math:`s_t \ge 0` is how
much signal a task has at all: tasks without any say nothing. Ridge and :math:`\kappa` shrink towards what blocks have in common; those are
taken that predict a task best from the other ones.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_FLOOR = 0.05  # share of the common function below which no block falls


@dataclass(frozen=True)
class BlockModel:
    """What was learnt.

    Args:
        weights: Of the features, in the logarithm: float64, ``[columns]``.
        ratios: The blocks' ratios, up to a common factor: float64, ``[blocks]``, positive.
        ridge: Price of a squared weight.
        share: How much of a block's own mean counts.
    """

    weights: Tensor
    ratios: Tensor
    ridge: float
    share: float


def learn(ratios: Tensor, features: Tensor) -> BlockModel:
    """Fit, with the ridge and the share that all tasks but one predict that one best with; of one task alone the strongest ridge and half.

    Args:
        ratios: Of tasks and blocks: float64, ``[tasks, blocks]``.
        features: Of blocks: float64, ``[blocks, columns]``.
    """
    ridge, share = max(RIDGES), 0.5
    if len(ratios) > 1:
        found: dict[tuple[float, float], float] = defaultdict(float)
        for task in range(len(ratios)):
            others = torch.cat([ratios[:task], ratios[task + 1 :]])
            for one in RIDGES:
                logarithm = features @ fit(others, features, one)
                for part in SHARES:
                    shape = combined(others, logarithm, part)
                    along = float(ratios[task] @ shape / shape.norm())
                    found[one, part] += along * abs(along)  # what points the other way counts against: noise gains nothing on average
        ridge, share = max(found, key=found.__getitem__)
    weights = fit(ratios, features, ridge)
    return BlockModel(weights, combined(ratios, features @ weights, share), ridge, share)


def combined(ratios: Tensor, logarithm: Tensor, share: float) -> Tensor:
    """The function of the features and the blocks' own means, ``[blocks]``, positive."""
    common = logarithm.exp()
    signal = (ratios @ common).clamp_min(0.0) / common.square().sum()  # [tasks]
    if not bool(signal.any()):
        return common
    own = signal @ ratios / signal.square().sum()
    return torch.maximum(common + share * (own - common), _FLOOR * common)


def fit(ratios: Tensor, features: Tensor, ridge: float, steps: int = 300) -> Tensor:
    """The weights ``w``.

    Args:
        ratios: Of tasks and blocks: float64, ``[tasks, blocks]``.
        features: Of blocks: float64, ``[blocks, columns]``; columns that are equal for all blocks are left at 0.
        ridge: Price of a squared weight, in shares of the sum of squared ratios.
        steps: Of L-BFGS, at most.

    Returns:
        float64, ``[columns]``.
    """
    varies = features.std(0) > 1e-9
    x = features[:, varies]
    weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    whole = ratios.square().sum()
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = missed(ratios, x @ weights).sum() / whole + ridge * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    out = torch.zeros(features.shape[1], dtype=torch.float64)
    out[varies] = weights.detach()
    return out


def missed(ratios: Tensor, logarithm: Tensor) -> Tensor:
    """Squares that are left of each task's ratios with its best scale: ``[tasks]``."""
    shape = (logarithm - logarithm.max()).exp()
    return ratios.square().sum(1) - (ratios @ shape).clamp_min(0.0).square() / shape.square().sum()

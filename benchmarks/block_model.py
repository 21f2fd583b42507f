r"""Signal for curvature as one function of a block's features, learnt over tasks.

A block's own :math:`\rho_i = G_i / F_i` is noisier than the differences between blocks, and differs from task to task. What carries over
to a new task is what kinds and depths have in common. So the ratios of all tasks are fitted by

.. math:: \rho_{t,i} \approx s_t\, e^{w^\top x_i}, \qquad s_t \ge 0,

by least squares with a ridge on ``w``: shrinkage towards equal ratios. Tasks without signal say little, ratios below zero are welcome. The
ridge is the one that predicts a task best from the other ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


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


def choose_ridge(ratios: Tensor, features: Tensor, ridges: Sequence[float] = RIDGES) -> float:
    """The ridge with which all tasks but one predict that one best; the largest where there is one task alone."""
    tasks = range(len(ratios))
    if len(ratios) < 2:
        return max(ridges)

    def error(ridge: float) -> float:
        total = 0.0
        for left_out in tasks:
            weights = fit(ratios[[task for task in tasks if task != left_out]], features, ridge)
            total += float(missed(ratios[left_out : left_out + 1], features @ weights))
        return total

    return min(ridges, key=error)


def least_squares(values: Tensor, features: Tensor, ridge: float = 1e-6) -> Tensor:
    """Weights of a linear fit, columns that are equal for all blocks included: float64, ``[columns]``."""
    gram = features.T @ features + ridge * len(features) * torch.eye(features.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, features.T @ values)

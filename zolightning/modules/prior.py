r"""Statistics of the blocks without the part that only moves the model's preference for some answers.

With few candidates, most of a row's gradient says "this answer is too likely", whatever the prompt. Fitted biases make the mean of that
part zero, not its noise: it stays in the curvature ``F``, where it is often the largest part of the upper layers and of the head, and,
since biases are fitted on few rows, in ``G`` too, with either sign. Training is judged after biases are fitted again, so none of it counts.

The row's derivative with respect to the biases is :math:`r_b = \mathrm{softmax}(s_b + \beta) - e_{y_b}`. What is left of the row's gradient
after regression on it is the gradient of the loss whose biases follow the weights:

.. math:: h'_b = h_b - A\, r_b, \qquad A = \mathbb E[h r^\top]\, \mathbb E[r r^\top]^{+}, \qquad
          G' = \|\mathbb E h'\|^2, \qquad F' = \mathbb E \|h'\|^2 .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from zolightning.modules.gradients import backward
from zolightning.modules.readers import Sum
from zolightning.modules.statistics import BlockStatistics
from zolightning.objectives import CandidateCrossEntropy
from zolightning.objectives.batch import Batch
from zolightning.objectives.candidate import candidate_scores
from zolightning.spaces import Space

_SMALLEST = 1e-6  # share of the largest eigenvalue below which a direction of the residuals is rounding


def without_prior(
    space: Space, objective: CandidateCrossEntropy, batches: Sequence[Batch], found: BlockStatistics, checkpoint: bool = False
) -> BlockStatistics:
    """Signal and curvature of the blocks without the preference for some answers.

    For ``K`` candidates this takes ``K`` backward passes over the rows and holds ``K`` sums of gradients.

    Args:
        space: The blocks.
        objective: The loss, with its biases.
        batches: The rows, of equal number in each batch.
        found: What :func:`~zolightning.modules.statistics.collect_statistics` found on the same batches.
        checkpoint: Checkpoint the decoder layers.

    Returns:
        Statistics of the same blocks.

    Example:
        >>> found = collect_statistics(space, objective, batches)
        >>> free = without_prior(space, objective, batches, found)
        >>> bool((free.fisher <= found.fisher * 1.01).all())
        True
    """
    weights = [part.to(space.device) for part in _whitened(space, objective, batches)]
    rows, directions = found.rows, weights[0].shape[1]
    sums = [Sum(space) for _ in range(directions + 1)]
    for batch, part in zip(batches, weights, strict=True):
        factors = torch.cat([torch.ones_like(part[:, :1]), part], dim=1)
        for column, total in enumerate(sums):
            backward(space, lambda: _weighted(space, objective, batch, factors[:, column]), total, checkpoint=checkpoint)  # noqa: B023
    shift = torch.cat(weights).mean(0)  # [directions]: mean of the whitened residuals, 0 where the biases fit these very rows
    of_prior = torch.stack([total.squared_norms() for total in sums[1:]]).sum(0).double().cpu() / rows**2
    for total, mean in zip(sums[1:], shift.tolist(), strict=True):
        for whole, own in zip(sums[0].held, total.held, strict=True):
            whole -= mean * own
    left = (found.fisher.double() - of_prior).clamp_min(0.0)  # mean squared norm of what is left of the rows
    mean_norm = sums[0].squared_norms().double().cpu() / rows**2
    gradient = (mean_norm * rows - left) / (rows - 1)
    fisher = left * rows / (rows - directions)
    batch_norm = gradient + (fisher - gradient) / found.batch_size
    return replace(found, gradient=gradient, batch=batch_norm, fisher=fisher)


def _weighted(space: Space, objective: CandidateCrossEntropy, batch: Batch, factors: Tensor) -> Tensor:
    loss, _ = objective.rows(space.model, batch)
    return (loss * factors.to(loss)).sum()


@torch.no_grad()
def _whitened(space: Space, objective: CandidateCrossEntropy, batches: Sequence[Batch]) -> list[Tensor]:
    """Derivatives with respect to the biases, ``[B, directions]`` a batch, in a basis in which their second moment over all rows is 1."""
    residuals = []
    for batch in batches:
        scores = candidate_scores(space.model, batch).double()
        if objective.biases is not None:
            scores = scores + objective.biases.to(scores)
        residuals.append((scores.softmax(1) - functional.one_hot(batch["label"], scores.shape[1])).cpu())
    together = torch.cat(residuals)
    values, vectors = torch.linalg.eigh(together.T @ together / len(together))
    kept = values > _SMALLEST * values.max()
    basis = vectors[:, kept] / values[kept].sqrt()
    return [part @ basis for part in residuals]

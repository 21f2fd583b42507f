"""Additive candidate biases: what a constant preference for some answers costs, and how to take it out.

Much of what a short fine-tuning run gains is such a preference. Every report of a candidate task therefore shows its figures
raw, after refitting the biases, and beside the best constant prediction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def fit_biases(scores: Tensor, labels: Tensor, steps: int = 50) -> Tensor:
    r"""Biases :math:`b` (``b[0] = 0``) that minimise the cross-entropy of ``scores + b``, by damped Newton steps.

    Args:
        scores: Candidate scores, ``[N, K]``.
        labels: Right candidates, ``[N]``.
        steps: Upper bound on Newton steps.

    Returns:
        float64, shape ``[K]``, on the CPU.
    """
    scores, labels = scores.detach().double().cpu(), labels.cpu()
    candidates = scores.shape[1]
    biases = torch.zeros(candidates, dtype=torch.float64)
    target = F.one_hot(labels, candidates).double().mean(0)
    # A tiny ridge keeps the optimum finite when some candidate is never right.
    ridge = 1e-3 / len(labels)

    def value(b: Tensor) -> Tensor:
        return F.cross_entropy(scores + b, labels) + 0.5 * ridge * b.square().sum()

    for _ in range(steps):
        p = torch.softmax(scores + biases, dim=1)
        gradient = (p.mean(0) - target + ridge * biases)[1:]
        hessian = (torch.diag(p.mean(0)) - p.T @ p / len(labels) + ridge * torch.eye(candidates, dtype=torch.float64))[1:, 1:]
        move = torch.zeros_like(biases)
        move[1:] = -torch.linalg.solve(hessian, gradient)
        rate = 1.0
        while value(biases + rate * move) > value(biases) and rate > 1e-6:
            rate /= 2
        biases = biases + rate * move
        if float(gradient.abs().max()) < 1e-10:
            break
    return biases


class Figures(NamedTuple):
    """Loss (nats) and accuracy (0 to 1) of one set of predictions."""

    loss: float
    accuracy: float


def candidate_figures(scores: Tensor, labels: Tensor, biases: Tensor | None = None) -> Figures:
    """Cross-entropy and accuracy of candidate scores, with biases added."""
    scores, labels = scores.double().cpu(), labels.cpu()
    if biases is not None:
        scores = scores + biases
    accuracy = (scores.argmax(dim=1) == labels).double().mean()
    return Figures(float(F.cross_entropy(scores, labels)), float(accuracy))


def constant_figures(train_labels: Tensor, labels: Tensor, candidates: int) -> Figures:
    """Figures of the constant predictor: the training rows' label frequencies, whatever the prompt."""
    counts = torch.bincount(train_labels.cpu(), minlength=candidates).double()
    log_prior = torch.log(counts.clamp_min(0.5) / counts.clamp_min(0.5).sum())
    return candidate_figures(log_prior.expand(len(labels), -1), labels)

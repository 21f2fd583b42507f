"""Candidate biases and the constant predictor."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from zolightning.objectives import candidate_figures, constant_figures, fit_biases


@pytest.mark.parametrize("candidates", [2, 3, 5])
def test_biases_are_the_optimum(candidates: int) -> None:
    """The gradient vanishes there, and no grid point or small move is better."""
    scores = torch.randn(200, candidates) * 2 + torch.arange(candidates) * 1.5
    labels = torch.randint(0, candidates, (200,))
    biases = fit_biases(scores, labels).requires_grad_()
    assert biases.dtype == torch.float64
    assert biases[0].item() == 0.0
    loss = F.cross_entropy(scores.double() + biases, labels)
    (gradient,) = torch.autograd.grad(loss, biases)
    assert float(gradient[1:].abs().max()) < 1e-4
    with torch.no_grad():
        for k in range(1, candidates):
            for move in (-0.05, 0.05):
                other = biases.clone()
                other[k] += move
                assert float(F.cross_entropy(scores.double() + other, labels)) > loss.item()


def test_biases_against_brute_force() -> None:
    scores, labels = torch.randn(60, 2), torch.randint(0, 2, (60,))
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(scores.double() + torch.tensor([0.0, b]), labels) for b in grid.tolist()])
    assert abs(float(fit_biases(scores, labels)[1]) - float(grid[losses.argmin()])) < 2e-3


def test_a_constant_preference_is_taken_out() -> None:
    """Adding any constants to the candidates leaves the corrected figures alone."""
    scores, labels = torch.randn(100, 3), torch.randint(0, 3, (100,))
    shifted = scores + torch.tensor([5.0, -3.0, 20.0])
    one = candidate_figures(scores, labels, fit_biases(scores, labels))
    two = candidate_figures(shifted, labels, fit_biases(shifted, labels))
    assert abs(one.loss - two.loss) < 1e-4
    assert one.accuracy == two.accuracy
    assert candidate_figures(shifted, labels).loss > one.loss + 1


@pytest.mark.parametrize("labels", [[0] * 20, [2] * 20, [1] * 20])
def test_candidates_that_are_never_right(labels: list[int]) -> None:
    """The optimum is far away but finite."""
    biases = fit_biases(torch.randn(20, 3), torch.tensor(labels))
    assert bool(torch.isfinite(biases).all())
    assert candidate_figures(torch.randn(20, 3), torch.tensor(labels), biases).accuracy == 1.0


def test_extreme_scores() -> None:
    """Newton steps alone would overshoot here."""
    scores = torch.tensor([[300.0, 0.0], [0.0, 300.0], [200.0, 0.0], [0.0, 250.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1, 1])
    biases = fit_biases(scores, labels)
    assert bool(torch.isfinite(biases).all())
    assert candidate_figures(scores, labels, biases).loss <= candidate_figures(scores, labels).loss


def test_figures_by_hand() -> None:
    figures = candidate_figures(torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]]), torch.tensor([1, 1]))
    assert figures.accuracy == 0.5
    assert abs(figures.loss - (math.log(4 / 3) + math.log(4)) / 2) < 1e-6


def test_constant_predictor() -> None:
    """The training rows' frequencies, whatever the prompt; a label unseen in training costs a finite loss."""
    figures = constant_figures(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 2)
    assert figures.accuracy == 0.5
    assert abs(figures.loss + (math.log(0.75) + math.log(0.25)) / 2) < 1e-12
    unseen = constant_figures(torch.tensor([0, 0]), torch.tensor([2]), 3)
    assert unseen.accuracy == 0.0
    assert abs(unseen.loss - math.log(3 / 0.5)) < 1e-12

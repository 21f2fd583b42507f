"""Statistics without the preference for some answers, against rows that are regressed by hand."""

from __future__ import annotations

import pytest
import torch
from nets import tiny
from torch import Tensor
from torch.nn import functional as F

import zolightning as zl
from zolightning.modules.prior import without_prior
from zolightning.modules.statistics import collect_statistics
from zolightning.objectives.candidate import candidate_scores

ROWS, BATCHES = 4, 5


def batches(candidates: int) -> list[dict[str, Tensor]]:
    """Random prompts and labels."""
    out = []
    for seed in range(BATCHES):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 60, (ROWS, 6), generator=generator)
        own = {
            "candidates": torch.arange(5, 5 + candidates).repeat(ROWS, 1),
            "label": torch.randint(candidates, (ROWS,), generator=generator),
        }
        out.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **own})
    return out


@pytest.mark.parametrize("candidates", [2, 3])
def test_equals_regression_of_the_rows(candidates: int) -> None:
    """Mean and mean square of what least squares through the origin leaves of every row's gradient."""
    model, data = tiny("llama", torch.float64, True), batches(candidates)
    space, objective = zl.DenseSpace(model), zl.CandidateCrossEntropy()
    objective.biases = torch.linspace(0, 0.5, candidates)
    gradients, residuals = [], []
    for batch in data:
        scores = candidate_scores(model, batch) + objective.biases
        residuals.append((scores.softmax(1) - F.one_hot(batch["label"], candidates)).detach())
        for loss in F.cross_entropy(scores, batch["label"], reduction="none"):
            gradients.append(torch.autograd.grad(loss, [block.tensor for block in space.blocks], retain_graph=True))
    r, n = torch.cat(residuals), ROWS * BATCHES
    found = without_prior(space, objective, data, collect_statistics(space, objective, data))
    for index in range(len(space.blocks)):
        h = torch.stack([row[index].flatten() for row in gradients])
        left = h - r @ torch.linalg.pinv(r, rtol=1e-9) @ h
        squares = float(left.square().sum()) / n
        assert float(found.fisher[index]) == pytest.approx(squares * n / (n - candidates + 1), rel=1e-8)
        pairs = (float(left.sum(0).square().sum()) - n * squares) / (n * (n - 1))
        assert float(found.gradient[index]) == pytest.approx(pairs, rel=1e-7, abs=1e-9 * squares)


def test_a_preference_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that does nothing but shift the candidates has neither signal nor curvature left."""

    class Shift(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = torch.nn.Linear(1, 2, bias=False).double()
            self.sense = torch.nn.Linear(3, 2, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return (self.lift(torch.ones_like(x[..., :1])) + self.sense(x))[:, 0]

    class Plain(zl.CandidateCrossEntropy):
        def rows(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            loss = F.cross_entropy(model(batch["input_ids"]), batch["label"], reduction="none")
            return loss, torch.ones_like(loss)

    torch.manual_seed(0)
    model, objective = Shift(), Plain()
    data = [{"input_ids": torch.randn(8, 1, 3).double(), "label": torch.randint(2, (8,))} for _ in range(8)]
    space = zl.DenseSpace(model)
    monkeypatch.setattr("zolightning.modules.prior.candidate_scores", lambda model, batch: model(batch["input_ids"]))
    whole = collect_statistics(space, objective, data)
    left = without_prior(space, objective, data, whole)
    assert float(left.fisher[0]) < 1e-12 * float(whole.fisher[0])
    assert float(left.fisher[1]) > 0.5 * float(whole.fisher[1])

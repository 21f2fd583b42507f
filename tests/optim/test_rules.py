"""Update rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zolightning.optim import SGD, Move, Rule
from zolightning.testing import check_rule


@pytest.mark.parametrize("rule", [SGD(), SGD(weight_decay=0.1)], ids=["plain", "decay"])
def test_common(rule: Rule) -> None:
    check_rule(rule)


def test_sgd_by_hand() -> None:
    weights, shrink = SGD(weight_decay=0.5).move(torch.tensor([2.0, -4.0]), torch.tensor(0.25))
    assert torch.equal(weights, torch.tensor([-0.5, 1.0]))
    assert shrink == 0.125


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan")])
def test_negative_weight_decay(weight_decay: float) -> None:
    with pytest.raises(ValueError, match=f"weight_decay={weight_decay} must be finite and not negative"):
        SGD(weight_decay)


class Uphill(SGD):
    def move(self, coefficients: Tensor, lr: Tensor) -> Move:
        return Move(coefficients * lr, 0.0)


class Growing(SGD):
    def move(self, coefficients: Tensor, lr: Tensor) -> Move:
        return super().move(coefficients, lr)._replace(shrink=-lr)


class InPlace(SGD):
    def move(self, coefficients: Tensor, lr: Tensor) -> Move:
        return Move(coefficients.mul_(-lr), 0.0)


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [(Uphill(), "does not go down"), (Growing(), "at least 0"), (InPlace(), "changed its input")],
    ids=["up", "grow", "in-place"],
)
def test_common_test_finds_mistakes(rule: Rule, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_rule(rule)

"""Estimators: the common test, the central difference by hand, and mistakes found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zolightning.estimators import Estimator, Probe, TwoPoint
from zolightning.testing import check_estimator


@pytest.mark.parametrize(
    "estimator", [TwoPoint(), TwoPoint(queries=2), TwoPoint(queries=5)], ids=lambda e: f"{type(e).__name__}-{e.queries}"
)
def test_common(estimator: Estimator) -> None:
    check_estimator(estimator)


def test_probes_and_coefficients_by_hand() -> None:
    estimator = TwoPoint(queries=2)
    assert estimator.probes == (Probe(0, 1), Probe(0, -1), Probe(1, 1), Probe(1, -1))
    assert torch.equal(estimator.coefficients(torch.tensor([1.0, 0.5, 0.25, 0.5]), eps=0.5), torch.tensor([0.25, -0.125]))


def test_curvature_cancels() -> None:
    """A symmetric change of the loss has no slope."""
    assert TwoPoint().coefficients(torch.tensor([1.75, 1.75]), eps=0.1).item() == 0.0


@pytest.mark.parametrize("queries", [0, -1])
def test_too_few_queries(queries: int) -> None:
    with pytest.raises(ValueError, match=f"queries={queries} must be at least 1"):
        TwoPoint(queries)


class Summed(TwoPoint):
    """Forgets the average."""

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        return super().coefficients(losses, eps) * self.queries


class Swapped(TwoPoint):
    """Says minus first but reads plus first."""

    @property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(Probe(query, -sign) for query, sign in super().probes)


class OneQuery(TwoPoint):
    @property
    def probes(self) -> tuple[Probe, ...]:
        return super().probes[:2] * self.queries


@pytest.mark.parametrize(
    ("estimator", "complaint"),
    [(Summed(2), "on a linear loss"), (Swapped(2), "on a linear loss"), (OneQuery(2), "a direction is never probed")],
)
def test_common_test_finds_mistakes(estimator: Estimator, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_estimator(estimator)

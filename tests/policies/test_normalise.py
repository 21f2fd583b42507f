"""The size of the scales."""

from __future__ import annotations

import pytest
import torch

from zolightning.policies import BlockInfo, Normaliser

BLOCKS = [BlockInfo("model.embed_tokens.weight", (100, 8)), BlockInfo("layers.0.up.weight", (8, 4)), BlockInfo("embed_norm", (8,))]


def test_the_exact_rule_keeps_the_energy() -> None:
    raw = torch.tensor([0.3, 2.0, 0.0], dtype=torch.float64)
    scales = Normaliser()(raw, Normaliser().shares(BLOCKS))
    sizes = torch.tensor([800.0, 32.0, 8.0], dtype=torch.float64)
    assert float((sizes * scales.square()).sum()) == pytest.approx(840)
    assert torch.allclose(scales / scales[0], raw / raw[0])


def test_uniform_scales_stay_one() -> None:
    assert torch.equal(Normaliser()(torch.full((3,), 0.37), Normaliser().shares(BLOCKS)), torch.ones(3))


def test_the_published_rule_counts_rows_that_a_batch_sees() -> None:
    normaliser = Normaliser("published", batch_size=2)
    sizes = torch.tensor([15.0 * 2 * 8, 32.0, 8.0], dtype=torch.float64)  # a vector with "embed" in its name counts in full
    assert torch.allclose(normaliser.shares(BLOCKS), sizes / sizes.sum())


def test_none_leaves_scales_raw() -> None:
    raw = torch.tensor([0.3, 2.0, 0.0])
    assert Normaliser("none")(raw, Normaliser("none").shares(BLOCKS)) is raw


def test_gradients() -> None:
    """With the factor the energy cannot change; detached, it can."""
    for detached in (False, True):
        raw = torch.tensor([0.3, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
        normaliser = Normaliser(detached=detached)
        shares = normaliser.shares(BLOCKS)
        (shares * normaliser(raw, shares).square()).sum().backward()
        assert raw.grad is not None
        assert bool(raw.grad.abs().max() < 1e-12) is not detached


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "paper"}, "rule='paper' must be 'exact', 'published' or 'none'"),
        ({"batch_size": 0}, "batch_size=0 must be a positive integer"),
        ({"batch_size": 1.5}, "batch_size=1.5 must be a positive integer"),
        ({"detached": "yes"}, "detached='yes' must be true or false"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normaliser(**options)  # type: ignore[arg-type]

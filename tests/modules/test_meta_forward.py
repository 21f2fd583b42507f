"""Statistics from forward passes alone, where the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zolightning as zl
from zolightning.modules.forward_statistics import forward_statistics, group_blocks, pairs_needed
from zolightning.policies import BlockInfo

ROWS = 8


class Three(nn.Module):
    """Three blocks, the first two of one group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (4, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.a, self.b, self.c])


class Quadratic(zl.Objective):
    """``h_b . theta`` plus a curved bowl."""

    def rows(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        bowl = 0.5 * sum(p.square().sum() for p in model.parameters())
        return model(batch["input_ids"]) + bowl, torch.ones(len(batch["input_ids"]), dtype=torch.float64)


def batches(count: int, noise: float) -> list[dict[str, Tensor]]:
    mean = torch.cat([torch.full((16,), 0.5), torch.full((8,), 0.6)]).double()
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": mean + noise * torch.randn(ROWS, 24, dtype=torch.float64, generator=generator)} for _ in range(count)]


def test_a_quadratic(caplog: pytest.LogCaptureFixture) -> None:
    noise, pairs = 0.5, 1200
    model = Three().eval()
    space, sampler = zl.DenseSpace(model), zl.GaussianSampler()
    sampler.bind(space)
    found = forward_statistics(space, Quadratic(), batches(pairs, noise), sampler, ["one", "one", "two"])
    signal = torch.tensor([0.25 * 4, 0.25 * 12, 0.36 * 8])
    spread = noise**2 * torch.tensor([4.0, 12.0, 8.0])
    assert found.gradient.tolist() == pytest.approx(signal.tolist(), rel=0.3)
    assert found.fisher.tolist() == pytest.approx((signal + spread).tolist(), rel=0.3)
    assert found.batch.tolist() == pytest.approx((signal + spread / ROWS).tolist(), rel=0.3)
    assert (found.rows, found.batch_size) == (pairs * ROWS, ROWS)
    assert "an error of 30 % for 2 groups takes about" in caplog.text


def test_the_cost_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert pairs_needed(14, 1.2) == 3136
    assert pairs_needed(14, 12) == 313600
    space, sampler = zl.DenseSpace(Three().eval()), zl.GaussianSampler()
    sampler.bind(space)
    with pytest.raises(ValueError, match="1 pairs of probes cannot tell 2 groups apart"):
        forward_statistics(space, Quadratic(), batches(1, 0.5), sampler, ["one", "one", "two"])
    with pytest.raises(ValueError, match="2 group names for 3 blocks"):
        forward_statistics(space, Quadratic(), batches(1, 0.5), sampler, ["one", "two"])
    assert caplog.text == ""


def test_groups() -> None:
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in ("self_attn.q_proj", "mlp.up_proj")]
    found = group_blocks([BlockInfo(name, (2, 2)) for name in [*names, "model.norm.weight"]], 2)
    assert found == ["q 1/2", "up 1/2", "q 1/2", "up 1/2", "q 2/2", "up 2/2", "q 2/2", "up 2/2", "norm"]
    with pytest.raises(ValueError, match="parts=0"):
        group_blocks([], 0)

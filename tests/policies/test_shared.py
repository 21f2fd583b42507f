"""The ratio of signal to curvature that tasks share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zolightning.policies import BlockInfo
from zolightning.policies.shared import neighbours, shared_ratio

BLOCKS = [
    BlockInfo("model.embed_tokens.weight"),
    *(BlockInfo(f"model.layers.{i}.mlp.{kind}_proj.weight") for i in range(4) for kind in ("up", "down")),
]
N = torch.tensor([100, 100])


def ratios(gradient: Tensor, fisher: Tensor, rows: Tensor = N, borrow: float = 0.0) -> Tensor:
    table = shared_ratio(BLOCKS, gradient, fisher, rows, power=1.0, borrow=borrow).values.detach().double().square()
    return table / table.max()


def test_equals_the_slope_of_the_mean_logarithm() -> None:
    """Without neighbours it is the derivative of mean log (rho + 1/N) at equal scales, for a unit of curvature, up to a constant."""
    generator = torch.Generator().manual_seed(0)
    gradient, fisher = (torch.rand(2, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    gradient[1] *= 1e3
    p = torch.ones(9, dtype=torch.float64, requires_grad=True)
    rho = gradient @ p / (fisher @ p)
    (slope,) = torch.autograd.grad((rho + 1 / N).log().mean(), p)
    # d log(rho + 1/N) / dp_i = (G_i / F - rho F_i / F) / (rho + 1/N): the first term is g_i, the second takes away a mean of F_i
    unit, value = fisher.sum(1, keepdim=True), rho.detach()[:, None]
    taken = (value * fisher / unit / (value + 1 / N[:, None])).mean(0)
    signal = slope + taken
    expected = signal / (fisher / unit).mean(0)
    assert torch.allclose(ratios(gradient, fisher), expected / expected.max(), rtol=1e-6)


def test_tasks_count_alike() -> None:
    """However large their gradients are; one whose signal is lost in the noise of its rows says little."""
    gradient, fisher = torch.ones(2, 9), torch.full((2, 9), 10.0)
    gradient[0, 1] = gradient[1, 2] = 5.0
    once, larger = ratios(gradient, fisher), ratios(gradient * torch.tensor([[1.0], [1e4]]), fisher * torch.tensor([[1.0], [1e4]]))
    assert torch.allclose(once, larger)
    assert once[1] == pytest.approx(once[2])
    few = ratios(gradient, fisher, torch.tensor([1, 1000]))
    assert few[1] < few[2]


def test_blocks_borrow_from_neighbours() -> None:
    """A lone ratio shrinks towards its kind in layers close by; the embedding speaks for itself."""
    gradient, fisher = torch.ones(2, 9), torch.full((2, 9), 10.0)
    gradient[:, 0] = gradient[:, 4] = 9.0
    own, borrowed = ratios(gradient, fisher), ratios(gradient, fisher, borrow=5.0)
    assert borrowed[0] == own[0] == 1
    assert own[4] == pytest.approx(1)
    assert ratios(gradient, fisher, borrow=50.0)[4] <= borrowed[4] <= own[4]
    near = neighbours(BLOCKS, 0.5)
    assert near[0].tolist() == [1.0] + [0.0] * 8
    assert near[3, 5] > near[3, 7] > near[3, 8] > 0
    assert near[3, 4] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"power": -1.0}, "power=-1.0 must be finite and at least 0"),
        ({"width": 0.0}, "width=0.0 must be finite"),
        ({"rows": torch.tensor([1, 2, 3])}, r"statistics of shapes \(2, 9\) and \(2, 9\) for 3 tasks, 9 blocks"),
        ({"gradient": torch.full((2, 9), float("nan"))}, "statistics are not finite"),
        ({"gradient": -torch.ones(2, 9)}, "the tasks share no signal"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    given = {"gradient": torch.ones(2, 9), "fisher": torch.ones(2, 9), "rows": N} | change
    with pytest.raises(ValueError, match=message):
        shared_ratio(BLOCKS, **given)  # type: ignore[arg-type]

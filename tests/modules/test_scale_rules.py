"""Rules that make scales of statistics: each by an independent computation, several places, levels of the loss, no signal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import film_data, make_trainer
from torch import Tensor

import zolightning as zl
from zolightning.modules import BlockStatistics, ByLoss, LargestDecrease, Ratio, ScaleRule, SharedRatio, UpperHalf
from zolightning.policies import BlockInfo, Features, LossTable, Policy, Table
from zolightning.policies.shared import shared_ratio

BLOCKS = [BlockInfo(f"model.layers.{i}.mlp.up_proj.weight", (4, 2)) for i in range(4)] + [BlockInfo("model.norm.weight", (2,))]


def place(gradient: list[float], fisher: list[float], loss: float = 0.6, rows: int = 100) -> BlockStatistics:
    """Statistics of the blocks."""
    g, f = torch.tensor(gradient, dtype=torch.float64), torch.tensor(fisher, dtype=torch.float64)
    return BlockStatistics(tuple(block.name for block in BLOCKS), g, g + f / 16, f, rows, 16, loss)


SMALL = place([1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 10.0, 20.0, 10.0, 50.0])
LARGE = place([900.0, -100.0, 0.0, 200.0, 0.0], [3000.0, 2000.0, 1000.0, 3000.0, 1000.0], loss=2.0)


def squares(policy: Policy) -> Tensor:
    """Squares of a table's raw scales, the largest 1."""
    assert isinstance(policy, Table)
    found = policy.values.detach().double().square()
    return found / found.max()


def test_ratio() -> None:
    """Places count in units of their own curvature: a hundred times the loss changes nothing."""
    g = (SMALL.gradient / 100 + LARGE.gradient / 10000).clamp_min(0)
    f = SMALL.fisher / 100 + LARGE.fisher / 10000
    torch.testing.assert_close(squares(Ratio()(BLOCKS, [SMALL, LARGE])), g / f / (g / f).max(), rtol=1e-6, atol=0)
    times = place((100 * SMALL.gradient).tolist(), (100 * SMALL.fisher).tolist())
    torch.testing.assert_close(squares(Ratio()(BLOCKS, [times, LARGE])), squares(Ratio()(BLOCKS, [SMALL, LARGE])))
    damped = g / (f + 0.5 * f.sum() * torch.tensor([8, 8, 8, 8, 2]) / 34)
    torch.testing.assert_close(squares(Ratio(0.5)(BLOCKS, [SMALL, LARGE])), damped / damped.max(), rtol=1e-6, atol=0)


def test_upper_half() -> None:
    """Layers 2 and 3 and the last norm, of another rule's scales."""
    whole, half = Ratio()(BLOCKS, [SMALL]).values.detach(), UpperHalf()(BLOCKS, [SMALL]).values.detach()
    assert half.tolist() == [0.0, 0.0, *whole[2:].tolist()]
    assert UpperHalf(SharedRatio())(BLOCKS, [SMALL]).values[:2].tolist() == [0.0, 0.0]


def test_shared_ratio() -> None:
    found = SharedRatio(2.0, borrow=0.5, width=0.1)(BLOCKS, [SMALL, LARGE])
    gradient, fisher = torch.stack([SMALL.gradient, LARGE.gradient]), torch.stack([SMALL.fisher, LARGE.fisher])
    expected = shared_ratio(BLOCKS, gradient, fisher, torch.tensor([100, 100]), 2.0, 0.5, 0.1)
    assert torch.equal(found.values, expected.values)


def test_by_loss() -> None:
    """Low: one rule, by all places. High: another, by those of high loss, or equal scales. The curvature is the same at all levels."""
    curvature = SMALL.fisher / 100 + LARGE.fisher / 10000
    policy = ByLoss(levels=(0.8, 1.2))(BLOCKS, [SMALL, LARGE])
    for loss, rule, places in ((0.5, UpperHalf(), [SMALL, LARGE]), (2.0, SharedRatio(2.0), [LARGE])):
        found = policy.normalise(policy(Features.reference(BLOCKS, loss))).detach().double().square()
        torch.testing.assert_close(found / found.max(), squares(rule(BLOCKS, places)), rtol=1e-5, atol=1e-9)
        assert float((found * curvature).sum()) == pytest.approx(float(curvature.sum()), rel=1e-5)
    alone = ByLoss()(BLOCKS, [SMALL])
    assert alone(Features.reference(BLOCKS, 2.0)).tolist() == pytest.approx([1.0] * 5)
    assert isinstance(ByLoss().blank(), LossTable)
    assert ByLoss().blank().bind(BLOCKS).state_dict().keys() == alone.state_dict().keys()


@pytest.mark.parametrize("rule", [Ratio(), LargestDecrease(), SharedRatio(), UpperHalf(), ByLoss()], ids=lambda rule: type(rule).__name__)
def test_no_signal(rule: ScaleRule) -> None:
    with pytest.raises(ValueError, match=r"no signal|no block has a positive"):
        rule(BLOCKS, [place([-1.0] * 5, [1.0] * 5)])


def test_no_curvature() -> None:
    with pytest.raises(ValueError, match="statistics without curvature: all gradients are zero"):
        Ratio()(BLOCKS, [place([0.0] * 5, [0.0] * 5)])


def test_places_of_a_run(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with levels has the statistics of a task apart by the loss of the batch; a run that goes on has them back."""

    class Seen(ByLoss):
        def __call__(self, blocks: Any, places: Any) -> Any:
            seen[:] = places
            return super().__call__(blocks, places)

    seen: list[BlockStatistics] = []
    objective = zl.ClosedForm(Seen(levels=(0.01, 50.0)), warm_up=1)
    found: list[float] = []

    def level(self: zl.ClosedForm, loss: float) -> int:
        found.append(loss)
        return len(found) % 2

    monkeypatch.setattr(zl.ClosedForm, "_level", level)
    module = zl.PolicyMetaTrainModule(tiny_folder, dtype="float32", meta_objective=objective, teacher=zl.OneCopySGD(0.1))
    make_trainer(tmp_path, 4).fit(module, film_data(tmp_path, batch_size=8))
    assert [one.rows for one in seen] == [16, 16]
    assert [one.loss for one in objective.statistics()] == pytest.approx([(found[1] + found[3]) / 2, (found[0] + found[2]) / 2])
    assert isinstance(module.policy, LossTable)
    other = zl.ClosedForm(Seen(), warm_up=1)
    other.load_state(objective.state())
    assert [one.loss for one in other.statistics()] == [one.loss for one in objective.statistics()]
    assert Policy.from_pretrained(tmp_path / "policy.safetensors").values.shape[1] == 2  # type: ignore[operator, union-attr]


def test_level_of_a_loss() -> None:
    objective = zl.ClosedForm(ByLoss(levels=(0.8, 1.2)))
    assert [objective._level(loss) for loss in (0.1, 0.8, 1.0, 1.2, 9.0)] == [0, 1, 1, 2, 2]
    assert zl.ClosedForm()._level(3.0) == 0


def test_a_batch_that_overflows_is_left_out(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from zolightning.modules import meta_objectives

    found = iter([SMALL, place([float("inf")] * 5, [1.0] * 5), SMALL])
    monkeypatch.setattr(meta_objectives, "collect_statistics", lambda *arguments: next(found))
    monkeypatch.setattr(meta_objectives, "RowNorms", lambda *arguments: None)
    objective, point = zl.ExpectedDecrease(warm_up=1), SimpleNamespace(space=None, objective=None, batch=None, checkpoint=False, task=0)
    losses = [float(objective(point, torch.ones(5, dtype=torch.float64)).loss) for _ in range(3)]  # type: ignore[arg-type]
    assert losses == pytest.approx([losses[0]] * 3)

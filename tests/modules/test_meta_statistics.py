"""Statistics of the blocks against loops over rows, and the closed forms that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from meta import bound, plain_gradients, plain_loss, token_batch, weights_of
from nets import tiny
from torch import Tensor, nn

import zolightning as zl
from zolightning.modules.per_row import RowNorms
from zolightning.modules.statistics import (
    BlockStatistics,
    collect_statistics,
    curvature_traces,
    expected_decrease,
    mean_statistics,
)
from zolightning.policies import BlockInfo, controls


def row_gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of all rows, ``[rows, ...]``, one after another (equal weights, so a row's share is its mean loss)."""
    rows = [
        plain_gradients(model, {key: value[row : row + 1] for key, value in batch.items()})
        for batch in batches
        for row in range(len(batch["scored"]))
    ]
    return {name: torch.stack([row[name].flatten() for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_equals_loops_over_rows(family: str, together: int, checkpoint: bool) -> None:
    model = tiny(family, torch.float64, True)
    space, batches = zl.DenseSpace(model), [token_batch(seed=seed) for seed in range(3)]
    rows = row_gradients(model, batches)
    for hold in (True, "cpu", False):
        norms = RowNorms(space, together, checkpoint)
        found = collect_statistics(space, zl.TokenCrossEntropy(), batches, hold, checkpoint, norms)
        assert (found.rows, found.batch_size) == (12, 4)
        for index, name in enumerate(found.names):
            h = rows[name]
            inner = h @ h.t()
            batch_of = torch.arange(12) // 4
            pairs = ~torch.eye(12, dtype=torch.bool) & (
                (batch_of[:, None] == batch_of) if hold is False else torch.ones(12, 12, dtype=torch.bool)
            )
            size = float(inner.diagonal().mean())
            assert float(found.gradient[index]) == pytest.approx(float(inner[pairs].mean()), rel=1e-10, abs=1e-12 * size + 1e-30)
            assert float(found.fisher[index]) == pytest.approx(size, rel=1e-10, abs=1e-30)
            means = torch.stack([h[batch_of == b].mean(0) for b in range(3)])
            assert float(found.batch[index]) == pytest.approx(float(means.square().sum(1).mean()), rel=1e-10, abs=1e-30)


def test_rows_of_different_weight() -> None:
    """Rows' shares of a token loss: their mean is the batch's gradient."""
    model = tiny("gpt2", torch.float64, True)  # a Llama's norms compute in float32
    space, batch = zl.DenseSpace(model), token_batch(rows=3)
    batch["scored"] = torch.tensor([1, 4, 2])
    found = collect_statistics(space, zl.TokenCrossEntropy(), [batch])
    loss, weight = bound(model, batch).rows(1)
    tensors = [block.tensor for block in space.blocks]
    shares = [torch.autograd.grad(loss[0, row] * 3 / weight.sum(), tensors, retain_graph=True) for row in range(3)]
    for index in range(len(tensors)):
        h = torch.stack([share[index].flatten() for share in shares])
        inner = h @ h.t()
        assert float(found.fisher[index]) == pytest.approx(float(inner.diagonal().mean()), rel=1e-10, abs=1e-30)
        assert float(found.batch[index]) == pytest.approx(float(h.mean(0).square().sum()), rel=1e-10, abs=1e-30)
        assert float(found.gradient[index]) == pytest.approx(float((inner.sum() - inner.trace()) / 6), rel=1e-9, abs=1e-12)


def test_a_batch_of_one_row_has_no_pairs() -> None:
    space = zl.DenseSpace(tiny("llama"))
    with pytest.raises(ValueError, match="batch of one row has no pairs"):
        collect_statistics(space, zl.TokenCrossEntropy(), [token_batch(rows=1)])
    with pytest.raises(ValueError, match="no batch"):
        collect_statistics(space, zl.TokenCrossEntropy(), [])
    with pytest.raises(ValueError, match="together=0"):
        RowNorms(space, 0)


def test_rows_are_taken_one_by_one_where_they_must(caplog: pytest.LogCaptureFixture) -> None:
    space = zl.DenseSpace(tiny("opt", tied=True))
    norms = RowNorms(space, 4)
    norms(zl.TokenCrossEntropy(), token_batch())
    assert norms.together == 1
    assert "gradients of rows are taken one by one: 'model.decoder" in caplog.text


def test_curvature_traces() -> None:
    """Against the trace of the Hessian's diagonal blocks, on blocks of a few weights."""
    model, batch = tiny("llama", torch.float64), token_batch()
    model.set_attn_implementation("eager")  # the fused attention has no second derivative
    space = zl.DenseSpace(model, include=["*norm.weight"])
    sampler = zl.RademacherSampler()
    sampler.bind(space)
    found = curvature_traces(space, zl.TokenCrossEntropy(), batch, sampler, samples=300)
    weights = weights_of(model)
    for index, block in enumerate(space.blocks):
        (g,) = torch.autograd.grad(plain_loss(model, batch, weights), weights[block.name], create_graph=True)
        trace = sum(torch.autograd.grad(g[i], weights[block.name], retain_graph=True)[0][i] for i in range(len(g)))
        spread = float(found.abs().max())
        assert float(found[index]) == pytest.approx(float(trace), abs=0.25 * spread)


def statistics(gradient: list[float], batch: list[float], fisher: list[float]) -> BlockStatistics:
    names = tuple(f"b{i}" for i in range(len(gradient)))
    return BlockStatistics(names, *(torch.tensor(x, dtype=torch.float64) for x in (gradient, batch, fisher)), 64, 8, 0.7)


class TestClosedForms:
    def test_by_name(self) -> None:
        found = statistics([4.0, 1.0], [1.0, 1.0], [1.0, 4.0])
        blocks = [BlockInfo("b0", (3,)), BlockInfo("b1", (5,))]
        table = controls.closed_form(blocks, found.by_name("gradient"), found.by_name("fisher"))
        assert table.values.tolist() == [1.0, 0.25]

    def test_decrease_is_at_its_maximum(self) -> None:
        """No other scales do better, by the very function that a policy is trained on."""
        torch.manual_seed(3)
        raw = torch.rand(3, 12, dtype=torch.float64) + 0.05
        found = statistics(raw[0].square().tolist(), (raw[0].square() + raw[1] / 8).tolist(), raw[1].tolist())
        best = found.decrease_scales()
        value = float(expected_decrease(best, found))
        assert value == pytest.approx(float(expected_decrease(best, found, lr=1.0 / float(found.gradient.sum()))), rel=1e-6)
        assert value == pytest.approx(float(expected_decrease(3 * best, found)), rel=1e-9)  # whatever their size
        for _ in range(200):
            other = (best.square() + 0.05 * best.square().mean() * torch.randn(12, dtype=torch.float64)).clamp_min(0).sqrt()
            assert float(expected_decrease(other, found)) <= value * (1 + 1e-9)
        assert float(expected_decrease(torch.ones(12, dtype=torch.float64), found)) < value

    def test_water_filling_drops_blocks_of_little_signal(self) -> None:
        found = statistics([1.0, 1e-4], [1.1, 1.0], [1.0, 10.0])
        best = found.decrease_scales()
        assert best[0] > 0
        assert best[1] == 0

    def test_no_signal(self) -> None:
        with pytest.raises(ValueError, match=r"no signal: .*\(64 rows\)"):
            statistics([-1.0, 0.0], [1.0, 1.0], [1.0, 1.0]).decrease_scales()
        with pytest.raises(ValueError, match="alignment=0"):
            statistics([1.0], [1.0], [1.0]).decrease_scales(0)


class TestSeveral:
    def test_no_task_counts_more_because_its_loss_is_larger(self) -> None:
        one, other = statistics([1.0, 3.0], [2.0, 4.0], [5.0, 5.0]), statistics([3.0, 1.0], [4.0, 2.0], [5.0, 6.0])
        scaled = statistics([300.0, 100.0], [400.0, 200.0], [500.0, 600.0])
        a, b = mean_statistics([one, other], normalise=True), mean_statistics([one, scaled], normalise=True)
        assert a.decrease_scales().tolist() == pytest.approx(b.decrease_scales().tolist())
        assert a.gradient.tolist() == pytest.approx([(1 / 10 + 3 / 11) / 2, (3 / 10 + 1 / 11) / 2])
        assert mean_statistics([one, other]).gradient.tolist() == [2.0, 2.0]

    def test_only_of_the_same_blocks(self) -> None:
        with pytest.raises(ValueError, match="cannot average 2 statistics of different blocks"):
            mean_statistics([statistics([1.0], [1.0], [1.0]), statistics([1.0, 1.0], [1.0, 1.0], [1.0, 1.0])])

    def test_file(self, tmp_path: Path) -> None:
        found = statistics([1.0, 3.0], [2.0, 4.0], [5.0, 5.0])
        again = BlockStatistics.load(found.save(tmp_path / "s.safetensors"))
        assert {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(again).items()} == {
            k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(found).items()
        }
        broken: Any = tmp_path / "broken.safetensors"
        broken.write_bytes(b"nothing")
        with pytest.raises(ValueError, match="cannot be read"):
            BlockStatistics.load(broken)

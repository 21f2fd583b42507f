"""Statistics of weights, what a step leaves behind, and the standard columns."""

from __future__ import annotations

import pytest
import torch

from zolightning.policies import BlockInfo, Features
from zolightning.policies import features as module
from zolightning.policies.features import STANDARD, mean_variance

BLOCKS = [
    BlockInfo("embed_tokens.weight", (100, 10)), BlockInfo("layers.0.mlp.up_proj.weight", (20, 10)),
    BlockInfo("layers.2.input_layernorm.weight", (10,)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("offset", "std"), [(0.0, 0.02), (1.0, 1e-3), (100.0, 0.5)])
def test_statistics_in_pieces(dtype: torch.dtype, offset: float, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces give what the whole gives, in float32, even where the mean is far larger than the spread."""
    monkeypatch.setattr(module, "_CHUNK", 97)
    x = (offset + std * torch.randn(31, 33)).to(dtype)
    mean, variance = mean_variance(x)
    exact = x.double()
    assert (mean.dtype, variance.dtype) == (torch.float32, torch.float32)
    assert float(mean) == pytest.approx(float(exact.mean()), rel=1e-5, abs=1e-8)
    assert float(variance) == pytest.approx(float(exact.var()), rel=1e-4, abs=1e-10 * offset**2)


def test_statistics_of_one_element_and_in_float64() -> None:
    assert [float(value) for value in mean_variance(torch.tensor([3.0]))] == [3.0, 0.0]
    x = torch.randn(50, dtype=torch.float64)
    mean, variance = mean_variance(x, torch.float64)
    assert float(mean - x.mean()) == pytest.approx(0, abs=1e-15)
    assert float(variance - x.var()) == pytest.approx(0, abs=1e-14)


def test_no_tensor_is_widened_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    x = torch.randn(100_000).bfloat16()
    with Watch():
        mean_variance(x)
    assert 0 < largest <= 1000


def test_before_the_first_step() -> None:
    features = Features(BLOCKS)
    assert features.losses.tolist() == [0, 0]
    assert features.sigma.tolist() == [1, 1, 1]


def test_state_is_live_and_written_in_place() -> None:
    features = Features(BLOCKS)
    state = features.state()
    features.measure([torch.full((100, 10), 2.0), torch.zeros(20, 10), torch.ones(10)])
    features.observe(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.1, 0.2, 0.3]))
    assert state["mean"].tolist() == [2, 0, 1]
    assert state["losses"].tolist() == [2, 4]
    assert state["sigma"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    features.observe(torch.tensor([5.0]), state["sigma"])
    assert state["losses"].tolist() == [5, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_step_leaves_no_trace(bad: float) -> None:
    features = Features(BLOCKS)
    features.observe(torch.tensor([1.0, 2.0]), torch.full((3,), 0.5))
    before = {name: tensor.clone() for name, tensor in features.state().items()}
    features.observe(torch.tensor([1.5, bad]), torch.full((3,), 0.7))
    assert all(torch.equal(tensor, before[name]) for name, tensor in features.state().items())


def test_standard_columns() -> None:
    features = Features.reference(BLOCKS, loss=torch.e - 1)
    features.step.fill_(99)
    row = dict(zip(STANDARD, features.standard()[1].tolist(), strict=True))
    on = {name for name, value in row.items() if name.startswith("kind") and value}
    assert on == {"kind:up"}
    assert (row["depth"], row["depth_squared"], row["offset"]) == (-1, 1, 0)
    assert row["size"] == pytest.approx((torch.log10(torch.tensor(200.0)).item() - 6) / 2)
    assert row["aspect"] == pytest.approx(0.30103)
    assert row["rms"] == pytest.approx((torch.tensor(5e-4).sqrt().log10().item() + 1.5) / 1.5)
    assert (row["loss"], row["progress"]) == pytest.approx((1.0, 0.5))
    norm = dict(zip(STANDARD, features.standard()[2].tolist(), strict=True))
    assert (norm["kind:norm"], norm["depth"], norm["offset"], norm["rms"], norm["aspect"]) == (1, 1, 1, 1, 0)
    assert dict(zip(STANDARD, features.standard()[0].tolist(), strict=True))["depth"] == 0


def test_standard_columns_are_finite_for_weights_of_zero() -> None:
    assert bool(torch.isfinite(Features(BLOCKS).standard()).all())

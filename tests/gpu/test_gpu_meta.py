"""Meta-training on a GPU: the numbers of the CPU, and one copy of the weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import tiny
from runs import film_data, make_trainer

import zolightning as zl
from zolightning.modules import teacher
from zolightning.modules.gradients import backward
from zolightning.modules.per_row import row_norms
from zolightning.modules.readers import ClippedStep, InnerProducts, SquaredNorms
from zolightning.modules.shift import Shift
from zolightning.objectives.batch import bucket
from zolightning.policies import FeaturePolicy
from zolightning.samplers.base import Direction

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def numbers(device: str, large: int, checkpoint: bool) -> dict[str, torch.Tensor]:
    """Everything that is read off a gradient, and the weights after a step."""
    model = tiny("llama", tied=False).to(device)
    ids = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(1)).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "scored": torch.full((4,), 3, device=device), "max_scored": 3}
    space, objective = zl.DenseSpace(model), zl.TokenCrossEntropy()
    direction = Direction(zl.GaussianSampler(), 5, 3, 0, torch.linspace(0.2, 2.0, len(space.blocks), device=device))
    products, norms = InnerProducts(space, direction), SquaredNorms(space)
    loss = objective.on(model, batch)
    value = backward(space, loss, products, norms, shift=Shift(space, direction, 0.03), checkpoint=checkpoint, large=large)
    with torch.no_grad(), space.probe(direction, 0.03):
        assert float(value) == pytest.approx(float(loss()), abs=1e-5)
    rows = row_norms(space, lambda: objective.rows(model, batch)[0], 4)
    backward(space, loss, ClippedStep(space, 0.1, 0.05), checkpoint=checkpoint, large=large)
    weights = torch.cat([block.tensor.detach().flatten() for block in space.blocks])
    return {"products": products.values, "norms": norms.values, "rows": rows, "weights": weights}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("large", [1 << 26, 1])
def test_the_numbers_of_the_cpu(large: int, checkpoint: bool) -> None:
    there, here = numbers("cuda", large, checkpoint), numbers("cpu", large, checkpoint)
    for name, expected in here.items():
        torch.testing.assert_close(there[name].cpu(), expected, rtol=2e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_captured_teacher_sees_fresh_biases(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases that are fitted anew before every step, and a teacher that replays its steps."""

    class Padded(zl.ZOOptimizer):
        """Sees rows as a graph does, which pads them: sums over another width are rounded differently."""

        def step(self, closure: Any) -> torch.Tensor:  # type: ignore[override]
            return super().step(closure.to(bucket(closure.batch)))

    def trained(folder: Path, capture: bool) -> torch.Tensor:
        folder.mkdir()
        monkeypatch.setattr(teacher, "ZOOptimizer", partial(Padded, pair=False, capture=capture, compile=False))
        module = zl.PolicyMetaTrainModule(
            tiny_folder, dtype="float32", policy=FeaturePolicy(), meta_objective=zl.ExpectedDecrease(warm_up=1),
            teacher=zl.ZerothOrder(lr=1e-2, eps=1e-2), refit_biases_every=1,
        )  # fmt: skip
        make_trainer(folder, 8, accelerator="gpu", devices=1).fit(module, film_data(folder, batch_size=8))
        return torch.cat([block.tensor.detach().flatten() for block in module.space.blocks])

    assert torch.equal(trained(tmp_path / "captured", True), trained(tmp_path / "plain", False))


def test_one_copy_of_the_weights() -> None:
    """A Llama of 1.2 GB: weights, activations and 5 % at most."""
    from benchmarks import shapes
    from benchmarks.meta_memory import frozen, peak
    from zolightning.modules.meta_objectives import MetaPoint

    device = torch.device("cuda")
    settings = {
        **shapes.SHAPES["llama-3.1-8b"],
        "num_hidden_layers": 8,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "vocab_size": 32000,
    }
    shapes.SHAPES["test"] = settings
    model = shapes.make("test", torch.bfloat16, device)
    del shapes.SHAPES["test"]
    batch = {**shapes.batch(model, 16, 128, device), "scored": torch.full((16,), 3, device=device), "max_scored": 3}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    loss = zl.TokenCrossEntropy().on(model, batch)
    plain = peak(lambda: frozen(model, loss))
    space, sampler = zl.DenseSpace(model), zl.GaussianSampler()
    sampler.bind(space)
    point = MetaPoint(space, loss.objective, batch, sampler, checkpoint=True)
    scales = torch.ones(len(space.blocks), device=device)

    def step() -> None:
        zl.AfterStep()(point, scales)
        zl.OneCopySGD().step(space, loss, 0, 0, checkpoint=True)

    step()
    assert plain > weights
    # Drawing noise in pieces takes the same memory on a small model as on a large one.
    assert peak(step) <= 1.05 * plain + (256 << 20)

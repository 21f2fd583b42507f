"""QuantScaleSpace: the scales move, the packed weights do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import bits, lm_closure, tiny
from quantised import KINDS, packed_bits, quantised, scale_bits
from torch import nn

import zolightning as zl
from zolightning.journal import Recorder
from zolightning.testing import check_space


def dequantised(module: nn.Module) -> torch.Tensor:
    """The matrix that a packed module stands for, in float32."""
    from bitsandbytes.functional import dequantize_4bit

    if module.weight.dtype == torch.int8:
        return module.weight.float() * module.state.SCB[:, None] / 127
    return dequantize_4bit(module.weight.data, module.weight.quant_state).float()


@pytest.mark.parametrize("kind", KINDS)
def test_common(tiny_folder: str, kind: str) -> None:
    """The common test; a run moves every scale and no packed weight."""
    model = quantised(tiny_folder, kind)
    packed = packed_bits(model)
    space = zl.QuantScaleSpace(model)
    check_space(space, lm_closure(model), 1e-2)
    scales = scale_bits(model)
    optimizer = zl.ZOOptimizer(space, lr=1e-3, eps=1e-3)
    for _ in range(3):
        optimizer.step(lm_closure(model))
    assert packed_bits(model) == packed
    assert all(bits(block.tensor) == scale_bits(model)[block.name.partition("layers.")[2].rpartition(".")[0]] for block in space.blocks)
    assert not set(scale_bits(model).values()) & set(scales.values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_moves(tiny_folder: str, kind: str) -> None:
    space = zl.QuantScaleSpace(quantised(tiny_folder, kind, "bfloat16"))
    sizes = {16, 32, 64} if kind == "int8" else {8, 16, 32}
    assert len(space.blocks) == 14
    assert space.blocks[0].name == "model.layers.0.self_attn.q_proj.scales"
    assert {block.numel for block in space.blocks} == sizes
    assert {block.dtype for block in space.blocks} == {torch.float32}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_probe_is_the_model_with_other_scales(tiny_folder: str, kind: str) -> None:
    """Out of place it computes what it would with the scales written in."""
    model = quantised(tiny_folder, kind)
    space, closure = zl.QuantScaleSpace(model), lm_closure(model)
    sampler = zl.GaussianSampler()
    sampler.bind(space)
    along = sampler.directions(0, 0, 1)[0]
    with torch.no_grad():
        with space.probe(along, 0.01):
            found = float(closure())
        for block in space.blocks:
            z = along.noise(block).draw(0, block.numel, torch.device("cpu"))
            block.tensor.add_(z.view_as(block.tensor) * 0.01)
        assert float(closure()) == found


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_scales_its_weights(tiny_folder: str, kind: str) -> None:
    model = quantised(tiny_folder, kind)
    module = model.model.layers[1].mlp.up_proj
    before = dequantised(module)
    space = zl.QuantScaleSpace(model, include=["*.1.mlp.up_proj"])
    assert [block.name.rpartition(".")[0] for block in space.blocks] == ["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        space.blocks[0].tensor.mul_(2)
    assert torch.allclose(dequantised(module), 2 * before, rtol=1e-5, atol=1e-7)


def test_double_quantisation_keeps_its_values(tiny_folder: str) -> None:
    """The statistics of the statistics are taken out once; the weights stay what they were."""
    model = quantised(tiny_folder, "nf4 double")
    before = [dequantised(layer.mlp.down_proj) for layer in model.model.layers]
    with torch.no_grad():
        loss = float(lm_closure(model)())
        zl.QuantScaleSpace(model)
        assert float(lm_closure(model)()) == pytest.approx(loss, rel=1e-6)
    for layer, old in zip(model.model.layers, before, strict=True):
        assert torch.equal(dequantised(layer.mlp.down_proj), old)
        assert not layer.mlp.down_proj.weight.quant_state.nested


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_scales_stay_positive(tiny_folder: str, kind: str) -> None:
    """An update that would cross zero ends there."""
    space = zl.QuantScaleSpace(quantised(tiny_folder, kind))
    sampler = zl.GaussianSampler()
    sampler.bind(space)
    old = torch.cat([block.tensor.flatten() for block in space.blocks])
    z = sampler.directions(0, 0, 1)
    with torch.no_grad():
        space.move(z, torch.tensor([10.0]), 0.0, torch.tensor(True))
    new = torch.cat([block.tensor.flatten() for block in space.blocks])
    noise = torch.cat([z[0].noise(block).draw(0, block.numel, torch.device("cpu")) for block in space.blocks])
    assert torch.allclose(new, (old + 10 * noise).clamp_min(0), atol=1e-5)
    assert 0.4 < float((new == 0).float().mean()) < 0.6


def test_clipping() -> None:
    """The derivative along a direction is cut, not the mean over directions."""
    losses = torch.tensor([7.0, 1.0, 1.0, 1.5])
    assert zl.TwoPoint(2).coefficients(losses, 0.5).tolist() == [3.0, -0.25]
    assert zl.TwoPoint(2, clip=2.0).coefficients(losses, 0.5).tolist() == [1.0, -0.25]
    assert zl.TwoPoint(2, clip=2.0).coefficients(losses.flip(0), 0.5).tolist() == [0.25, -1.0]
    assert zl.TwoPoint(clip=1.0).coefficients(torch.tensor([float("nan"), 1.0]), 0.5).isnan().all()
    with pytest.raises(ValueError, match=r"^clip=0.0 must be positive$"):
        zl.TwoPoint(clip=0.0)


class TestRefusals:
    def test_not_quantised(self) -> None:
        with pytest.raises(ValueError, match=r"^a QuantScaleSpace needs a quantised model: set quantization to nf4, fp4 or int8$"):
            zl.QuantScaleSpace(tiny("llama"))

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"include": ["*norm*"]}, r"pattern '\*norm\*' matches no quantised module; names look like 'model.layers.0.self_attn.q_proj'"),
            ({"exclude": ["*"]}, r"nothing to move: 14 quantised modules, include=\[\], exclude=\['\*'\]"),
        ],
    )
    def test_nothing_to_move(self, tiny_folder: str, options: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=f"^{text}$"):
            zl.QuantScaleSpace(quantised(tiny_folder, "nf4"), **options)

    def test_moved_afterwards(self, tiny_folder: str) -> None:
        """Scales that are replaced behind the space's back are noticed before the first step."""
        model = quantised(tiny_folder, "nf4")
        space = zl.QuantScaleSpace(model)
        state = model.model.layers[0].mlp.up_proj.weight.quant_state
        state.absmax = state.absmax.clone()
        with pytest.raises(ValueError, match=r"^'model.layers.0.mlp.up_proj' was moved to other memory after the space was made"):
            zl.ZOOptimizer(space).step(lm_closure(model))


def test_replay_moves_scales_as_training_does(tiny_folder: str, tmp_path: Path) -> None:
    """Steps so large that scales end at 0; the journal alone gives the same bits."""
    model = quantised(tiny_folder, "nf4")
    optimizer = zl.ZOOptimizer(zl.QuantScaleSpace(model), lr=3.0, eps=1e-3)
    recorder = Recorder(tmp_path / "journal.zo", optimizer)
    for _ in range(3):
        optimizer.step(lm_closure(model))
    recorder.drain()
    assert any(bool((block.tensor == 0).any()) for block in optimizer.space.blocks)
    again = zl.QuantScaleSpace(quantised(tiny_folder, "nf4"))
    assert zl.replay(recorder.path, again) == 3
    assert [bits(block.tensor) for block in again.blocks] == [bits(block.tensor) for block in optimizer.space.blocks]
    with pytest.raises(ValueError, match=r"there is no 'model\.layers\.0\.self_attn\.q_proj\.scales' here"):
        zl.replay(recorder.path, quantised(tiny_folder, "nf4"))

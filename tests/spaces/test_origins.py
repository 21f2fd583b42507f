"""Blocks beside the weights of a base model: which weight they change, and what a policy for the base model says of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from nets import bits, lm_closure, tiny
from quantised import quantised

import zolightning as zl
from zolightning.models import load_model
from zolightning.policies import BlockInfo, FeaturePolicy, Policy, Table
from zolightning.samplers import PolicySampler
from zolightning.spaces.packed import unpacked
from zolightning.testing import DeviceOnly

BANK = partial(zl.LowRankSpace, rank=2, slots=2, refresh=2)
SPACES: dict[str, Any] = {"lora": zl.AdapterSpace, "bank": BANK, "scales": partial(zl.QuantScaleSpace, include=["*q_proj", "*v_proj"])}
NAMES = {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "qv"}


def table(folder: str) -> Table:
    """A policy for all blocks of a base model: another scale for each."""
    infos = [BlockInfo.of(block) for block in zl.DenseSpace(load_model(folder, "float32")).blocks]
    return Table.of(infos, torch.arange(1.0, len(infos) + 1))


def bound(policy: Policy, space: zl.Space) -> PolicySampler:
    sampler = PolicySampler(policy)
    sampler.bind(space)
    return sampler


@pytest.mark.parametrize("space", SPACES)
def test_a_policy_for_the_base_model(tiny_folder: str, space: str) -> None:
    """Every block has the scale of its weight, and the space's own size as a whole."""
    policy, made = table(tiny_folder), SPACES[space](quantised(tiny_folder, "nf4 double"))
    assert {block.origin.name for block in made.blocks} == NAMES
    own = dict(zip([info.name for info in policy.blocks], policy.values.tolist(), strict=True))
    expected = torch.tensor([own[block.origin.name] for block in made.blocks])
    scales, sizes = bound(policy, made).scales(), torch.tensor([block.numel for block in made.blocks])
    assert torch.allclose(scales / scales[0], expected / expected[0])
    assert float((sizes * scales.square()).sum() / sizes.sum()) == pytest.approx(1)


def test_slots_have_the_size_that_all_have(tiny_folder: str) -> None:
    """In a step the blocks that move have the scales of their weights, and together as much as they are; the others have 0."""
    space = BANK(quantised(tiny_folder, "nf4"))
    sampler, sizes = bound(table(tiny_folder), space), torch.tensor([block.numel for block in space.blocks])
    whole = sampler.scales()
    for step in (0, 2):
        active = space.active(torch.tensor(step))
        with DeviceOnly():
            scales = sampler.restrict(whole, active)
        assert torch.equal(scales == 0, active == 0)
        assert float((sizes * scales.square()).sum() / (sizes * active).sum()) == pytest.approx(1)
        ratios = scales[active == 1] / whole[active == 1]
        assert torch.allclose(ratios, ratios[0])


@pytest.mark.parametrize("space", ["lora", "bank"])
def test_a_policy_sees_the_weights_of_the_base(space: str) -> None:
    """What it knows of a block of an adapter is what it knows of the linear map, to the bit."""
    dense = zl.DenseSpace(tiny("llama"))
    known = bound(FeaturePolicy(), dense).features.standard()
    rows = {block.name: known[i] for i, block in enumerate(dense.blocks)}
    made = SPACES[space](tiny("llama"))
    found = bound(FeaturePolicy(), made).features.standard()
    assert torch.equal(found, torch.stack([rows[block.origin.name] for block in made.blocks]))


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8"])
def test_packed_weights_are_read_as_they_count(tiny_folder: str, kind: str) -> None:
    """As transformers unpacks them; a scale that moved is seen."""
    model = quantised(tiny_folder, kind)
    space = zl.QuantScaleSpace(model, include=["*down_proj"])
    with torch.no_grad():
        space.blocks[0].tensor.mul_(2.0)
    found = [space.blocks[0].weight.clone(), unpacked(model.get_submodule("model.layers.0.mlp.up_proj"))]
    assert space.blocks[0].origin is not None
    assert space.blocks[0].origin.shape == tuple(found[0].shape) == (32, 64)
    plain = quantised(tiny_folder, kind).dequantize().model.layers[0].mlp
    for weight, expected in zip(found, (2 * plain.down_proj.weight, plain.up_proj.weight), strict=True):
        assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-7)


def test_other_parameters_of_a_wrapped_model() -> None:
    """Norms and biases keep the name that they had before an adapter came; so do the weights that it stands beside."""
    model = zl.AdapterSpace(tiny("qwen2")).model
    found = {block.name: block.origin.name for block in zl.DenseSpace(model).blocks if block.origin is not None}
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    assert found[f"{start}.base_layer.bias"] == "model.layers.0.self_attn.q_proj.bias"
    assert found[f"{start}.base_layer.weight"] == found[f"{start}.lora_A.default.weight"] == "model.layers.0.self_attn.q_proj.weight"
    assert found["base_model.model.model.norm.weight"] == "model.norm.weight"
    prefixed = zl.DenseSpace(zl.AdapterSpace(tiny("qwen2"), "prefix").model)
    assert prefixed.blocks[0].origin is not None
    assert prefixed.blocks[0].origin.name == "model.embed_tokens.weight"
    assert zl.AdapterSpace(tiny("qwen2"), "prefix").blocks[0].origin is None
    assert all(block.origin is None for block in zl.DenseSpace(tiny("qwen2")).blocks)


@pytest.mark.parametrize("space", ["lora", "bank"])
def test_a_policy_for_another_model(tiny_folder: str, space: str) -> None:
    """One line that names the blocks; a weight that many blocks change is named once."""
    other = Table().bind([BlockInfo("model.layers.0.self_attn.q_proj.weight", (8, 32)), BlockInfo("lm_head.weight", (9, 9))])
    with pytest.raises(ValueError, match="the policy is for other blocks") as error:
        bound(other, SPACES[space](quantised(tiny_folder, "nf4")))
    assert str(error.value) == (
        "the policy is for other blocks (3 missing from the policy: 'model.layers.0.self_attn.v_proj.weight', "
        "'model.layers.1.self_attn.q_proj.weight', 'model.layers.1.self_attn.v_proj.weight'; 1 of another shape: "
        "'model.layers.0.self_attn.q_proj.weight' (8, 32) in the policy, (32, 32) here); match='kind' matches by kind and relative depth"
    )


def test_a_policy_in_a_run_that_is_resumed() -> None:
    """Taken up in the middle of a slot's turn, to the same bits; in every step only that slot has scales."""

    def make() -> zl.ZOOptimizer:
        return zl.ZOOptimizer(BANK(tiny("llama")), PolicySampler(FeaturePolicy(hidden=3)), lr=1e-2, eps=1e-2)

    def steps(optimizer: zl.ZOOptimizer, count: int) -> list[bytes]:
        for _ in range(count):
            optimizer.step(lm_closure(optimizer.space.model))
        return [bits(block.tensor) for block in optimizer.space.blocks]

    whole, half, rest = make(), make(), make()
    expected = steps(whole, 7)
    for row in whole.history.drain(7):
        turn = row.step // 2 % 2
        assert [bool(scale) for scale in row.scales] == [slot == turn for slot in (0, 1)] * 4
    assert steps(half, 3) != expected
    with torch.no_grad():
        for block, saved in zip(rest.space.blocks, half.space.blocks, strict=True):
            block.tensor.copy_(saved.tensor)
    rest.load_state_dict(half.state_dict())
    assert steps(rest, 4) == expected

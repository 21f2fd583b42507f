"""What names and shapes say; which block stands for which."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from nets import CONFIGS, tiny

from zolightning.policies import BlockInfo, match_blocks
from zolightning.policies.layout import KINDS, depths


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.embed_tokens.weight", "embedding", None),
        ("model.decoder.embed_positions.weight", "embedding", None),
        ("model.layers.12.self_attn.q_proj.weight", "q", 12),
        ("model.layers.0.self_attn.k_proj.weight", "k", 0),
        ("model.layers.0.self_attn.v_proj.bias", "bias", 0),
        ("model.layers.0.self_attn.o_proj.weight", "o", 0),
        ("model.layers.0.self_attn.q_norm.weight", "norm", 0),
        ("model.decoder.layers.3.self_attn.out_proj.weight", "o", 3),
        ("model.layers.3.mlp.gate_proj.weight", "gate", 3),
        ("model.layers.3.mlp.up_proj.weight", "up", 3),
        ("model.layers.3.mlp.down_proj.weight", "down", 3),
        ("model.decoder.layers.3.fc1.weight", "up", 3),
        ("model.decoder.layers.3.fc2.weight", "down", 3),
        ("model.decoder.final_layer_norm.bias", "norm", None),
        ("transformer.h.1.attn.c_attn.weight", "qkv", 1),
        ("transformer.h.1.attn.c_proj.weight", "o", 1),
        ("transformer.h.1.mlp.c_fc.weight", "up", 1),
        ("transformer.h.1.mlp.c_proj.weight", "down", 1),
        ("transformer.h.1.ln_2.weight", "norm", 1),
        ("transformer.ln_f.weight", "norm", None),
        ("transformer.wte.weight", "embedding", None),
        ("transformer.h.4.self_attention.query_key_value.weight", "qkv", 4),
        ("transformer.h.4.self_attention.dense.weight", "o", 4),
        ("transformer.h.4.mlp.dense_h_to_4h.weight", "up", 4),
        ("transformer.h.4.mlp.dense_4h_to_h.weight", "down", 4),
        ("transformer.word_embeddings.weight", "embedding", None),
        ("gpt_neox.embed_in.weight", "embedding", None),
        ("embed_out.weight", "head", None),
        ("lm_head.weight", "head", None),
        ("model.layers.2.block_sparse_moe.experts.5.w2.weight", "down", 2),
        ("model.layers.2.block_sparse_moe.gate.weight", "other", 2),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.default.weight", "q", 7),
        ("encoder.layer.2.attention.self.query.weight", "q", 2),
        ("encoder.layer.2.attention.output.dense.weight", "o", 2),
        ("encoder.layer.2.output.dense.weight", "other", 2),
        ("0.weight", "other", 0),
    ],
)
def test_kind_and_layer(name: str, kind: str, layer: int | None) -> None:
    block = BlockInfo(name)
    assert (block.kind, block.layer) == (kind, layer)
    assert kind in KINDS


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gemma", "gpt2"])
def test_ordinary_models_have_no_unknown_block(family: str) -> None:
    assert family in CONFIGS
    names = [name for name, _ in tiny(family).named_parameters()]
    assert [name for name in names if BlockInfo(name).kind == "other"] == []


def test_depth_is_relative() -> None:
    blocks = [BlockInfo(name) for name in ("wte.weight", "h.0.a", "h.1.a", "h.4.a")]
    assert depths(blocks) == [None, 0.0, 0.25, 1.0]
    assert depths([BlockInfo("h.0.a")]) == [0.0]


OWN = [BlockInfo("a.weight", (2, 3)), BlockInfo("b.weight", (4,)), BlockInfo("c.weight")]


def test_exact_match_in_any_order() -> None:
    wanted = [BlockInfo("c.weight", (9, 9)), BlockInfo("a.weight", (2, 3)), BlockInfo("b.weight", (4,))]
    assert match_blocks(OWN, wanted) == [2, 0, 1]


def test_differences_are_listed() -> None:
    wanted = [BlockInfo("a.weight", (3, 2)), BlockInfo("b.weight", (4,)), *(BlockInfo(f"x{i}", (1,)) for i in range(5))]
    with pytest.raises(ValueError, match="policy is for other blocks") as error:
        match_blocks(OWN, wanted)
    assert str(error.value) == (
        "the policy is for other blocks (5 missing from the policy: 'x0', 'x1', 'x2', ...; 1 not among the blocks that move: 'c.weight'; "
        "1 of another shape: 'a.weight' (2, 3) in the policy, (3, 2) here); match='kind' matches by kind and relative depth"
    )


def llama(layers: int, width: int = 4) -> list[BlockInfo]:
    parts = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm", "post_attention_layernorm")
    inner = [BlockInfo(f"model.layers.{i}.{part}.weight", (width,)) for i in range(layers) for part in parts]
    return [BlockInfo("model.embed_tokens.weight", (9, width)), *inner, BlockInfo("model.norm.weight", (width,))]


def test_match_by_kind_and_depth() -> None:
    own, wanted = llama(5), llama(3, width=6)
    found = {wanted[i].name: own[j].name for i, j in enumerate(match_blocks(own, wanted, "kind"))}
    assert found["model.embed_tokens.weight"] == "model.embed_tokens.weight"
    assert found["model.norm.weight"] == "model.norm.weight"
    for here, there in ((0, 0), (1, 2), (2, 4)):
        for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm", "post_attention_layernorm"):
            assert found[f"model.layers.{here}.{part}.weight"] == f"model.layers.{there}.{part}.weight"


def test_match_by_kind_across_families() -> None:
    wanted = [BlockInfo("transformer.h.0.mlp.c_fc.weight", (1,)), BlockInfo("transformer.h.1.mlp.c_fc.weight", (1,))]
    wanted += [BlockInfo("transformer.ln_f.weight", (1,))]
    found = [llama(4)[j].name for j in match_blocks(llama(4), wanted, "kind")]
    assert found == ["model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight"]


def beside(layer: int, part: str) -> BlockInfo:
    """The matrix of an adapter."""
    return BlockInfo(f"wrapped.layers.{layer}.{part}.lora_{part}", (3, 4), BlockInfo(f"model.layers.{layer}.{part}.weight", (4,)))


@pytest.mark.parametrize("match", ["exact", "kind"])
def test_blocks_beside_weights(match: Literal["exact", "kind"]) -> None:
    """They are found through the weight that they change, unless the policy knows them; then all of its blocks are wanted."""
    own, wanted = llama(2), [beside(1, "mlp.up_proj"), BlockInfo("model.norm.weight", (4,)), beside(1, "mlp.up_proj")]
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    assert [own[j].name for j in match_blocks(own, wanted, match)] == names
    adapters = [beside(layer, part) for layer in range(2) for part in ("mlp.up_proj", "self_attn.q_proj")]
    assert match_blocks([*own, *adapters], [*adapters, *own], match) == [10, 11, 12, 13, *range(10)]


def test_blocks_beside_weights_of_another_model() -> None:
    with pytest.raises(ValueError, match="of another shape") as error:
        match_blocks(llama(2, width=5), [beside(1, "mlp.up_proj"), beside(7, "mlp.up_proj"), beside(7, "mlp.up_proj")])
    assert str(error.value) == (
        "the policy is for other blocks (1 missing from the policy: 'model.layers.7.mlp.up_proj.weight'; 1 of another shape: "
        "'model.layers.1.mlp.up_proj.weight' (5,) in the policy, (4,) here); match='kind' matches by kind and relative depth"
    )


def test_missing_kind() -> None:
    with pytest.raises(ValueError, match=r"no block of kind 'head' for 'lm_head.weight'; it has q, up, norm, embedding"):
        match_blocks(llama(2), [BlockInfo("lm_head.weight", (9, 4))], "kind")
    with pytest.raises(ValueError, match="match='depth' must be 'exact' or 'kind'"):
        match_blocks(OWN, OWN, "depth")  # type: ignore[arg-type]


def test_sizes() -> None:
    assert BlockInfo("a", (2, 3)).numel == torch.zeros(2, 3).numel()
    assert BlockInfo("a").numel == 1
    assert BlockInfo("a", ()).numel == 1

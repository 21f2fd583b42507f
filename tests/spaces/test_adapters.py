"""AdapterSpace: the adapter moves, the base does not, and the objective still finds its model."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from nets import Net, bits, lm_closure, padded, state_bits, tiny
from quantised import KINDS, check_pair, packed_bits, quantised, scale_bits

import zolightning as zl
from zolightning.objectives.forward import candidate_logits, last_logits
from zolightning.testing import check_space


def awake(space: zl.Space) -> zl.Space:
    """LoRA's B is 0 at the start, so that A alone does nothing; not any more."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in space.blocks:
            if "lora_B" in block.name:
                block.tensor.copy_(torch.randn(block.tensor.shape, generator=generator))
    return space


@pytest.mark.parametrize("kind", ["lora", "prefix"])
@pytest.mark.parametrize("base", [*KINDS, "float32", "bfloat16"])
def test_common(tiny_folder: str, base: str, kind: Any) -> None:
    """The common test on every base; the base keeps its bits through probes and updates."""
    model = quantised(tiny_folder, base) if base in KINDS else tiny("llama", getattr(torch, base))
    dense, packed, scales = state_bits(model), packed_bits(model), scale_bits(model)
    space = awake(zl.AdapterSpace(model, kind))
    check_space(space, lm_closure(space.model), 0.1)
    optimizer = zl.ZOOptimizer(space, lr=1e-2, eps=1e-2)
    before = [bits(block.tensor) for block in space.blocks]
    for _ in range(2):
        optimizer.step(lm_closure(space.model))
    assert all(bits(block.tensor) != old for block, old in zip(space.blocks, before, strict=True))
    assert (packed_bits(model), scale_bits(model)) == (packed, scales)
    after = {name.replace("base_layer.", ""): value for name, value in state_bits(model).items() if "lora_" not in name}
    assert after == dense


class TestLora:
    def test_what_moves(self, tiny_folder: str) -> None:
        space = zl.AdapterSpace(quantised(tiny_folder, "nf4"), rank=3)
        assert len(space.blocks) == 8  # A and B of queries and values of two layers
        assert space.blocks[0].name == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
        assert {tuple(block.tensor.shape) for block in space.blocks} == {(3, 32), (32, 3), (16, 3)}
        assert {block.dtype for block in space.blocks} == {torch.float32}

    def test_targets(self, tiny_folder: str) -> None:
        space = zl.AdapterSpace(quantised(tiny_folder, "int8"), targets=["*.1.mlp.*", "*o_proj"])
        assert {block.name.partition(".lora_")[0].partition("layers.")[2] for block in space.blocks} == {
            "1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj", "0.self_attn.o_proj", "1.self_attn.o_proj",
        }  # fmt: skip

    def test_starts_as_the_base(self, tiny_folder: str) -> None:
        model = quantised(tiny_folder, "nf4")
        with torch.no_grad():
            expected = float(lm_closure(model)())
            assert float(lm_closure(zl.AdapterSpace(model).model)()) == expected

    def test_alpha(self, tiny_folder: str) -> None:
        """Twice the factor is twice as far to first order."""
        losses = []
        with torch.no_grad():
            for alpha in (0.0, 1e-3, 2e-3):
                space = awake(zl.AdapterSpace(tiny("llama", torch.float64), alpha=alpha))
                losses.append(float(lm_closure(space.model)()))
        assert (losses[2] - losses[0]) / (losses[1] - losses[0]) == pytest.approx(2, rel=0.05)

    @pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
    def test_the_start_is_a_function_of_the_seed(self, init: Any) -> None:
        """And draws nothing from the global random state."""
        state = torch.get_rng_state()
        first, second, other = (zl.AdapterSpace(tiny_in_state(state), init=init, seed=seed) for seed in (4, 4, 5))
        assert torch.equal(torch.get_rng_state(), state)
        assert bits(first.blocks[0].tensor) == bits(second.blocks[0].tensor) != bits(other.blocks[0].tensor)

    def test_inits_differ(self) -> None:
        assert (
            len({bits(zl.AdapterSpace(tiny("llama"), init=init).blocks[0].tensor) for init in ("kaiming", "gaussian", "orthogonal")}) == 3
        )  # type: ignore[arg-type]

    def test_the_base_stays_open_to_other_spaces(self) -> None:
        model = tiny("llama")
        zl.AdapterSpace(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def tiny_in_state(state: torch.Tensor) -> torch.nn.Module:
    """A model; making it leaves the global random state as it is."""
    model = tiny("llama")
    torch.set_rng_state(state)
    return model


class TestPrefix:
    def test_starts_as_real_tokens(self) -> None:
        """Logits behind the prefix are those behind the tokens that it was made of."""
        model = tiny("gpt2")
        prefix = torch.randint(model.config.vocab_size, (1, 4), generator=torch.Generator().manual_seed(9))
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            expected = model(input_ids=torch.cat([prefix, ids], 1)).logits[:, 4:]
            space = zl.AdapterSpace(model, "prefix", tokens=4, seed=9)
            found = space.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert [tuple(block.tensor.shape) for block in space.blocks] == [(4, 2 * 2 * 32)]
        assert torch.allclose(found, expected, atol=1e-5)

    def test_the_mask_arrives_whoever_calls(self) -> None:
        """By position, with embeddings in place of tokens, and where the adapter is switched off: padding is not seen."""
        model = tiny("llama")
        space = zl.AdapterSpace(model, "prefix", tokens=4)
        ids, mask = torch.tensor([[1, 1, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
        whole: Any = space.model
        with torch.no_grad():
            alone, last = whole(input_ids=ids[:, 2:], attention_mask=mask[:, 2:]).logits[:, -1], whole(ids, mask).logits[:, -1]
            assert torch.allclose(last, alone, atol=1e-5)
            embeddings = model.get_input_embeddings()(ids)  # type: ignore[operator]
            with_mask = whole(inputs_embeds=embeddings, attention_mask=mask).logits[:, -1]
            assert not torch.equal(with_mask, whole(inputs_embeds=embeddings).logits[:, -1])
            with whole.disable_adapter():
                off = whole(input_ids=ids, attention_mask=mask).logits[:, -1]
                assert torch.allclose(off, whole(input_ids=ids[:, 2:], attention_mask=mask[:, 2:]).logits[:, -1], atol=1e-5)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
    def test_padding_changes_nothing(self, family: str) -> None:
        """Rows have the same logits whatever their padding, in both forms that objectives use."""
        space = zl.AdapterSpace(tiny(family), "prefix")
        found = []
        with torch.no_grad():
            for extra in (0, 3):
                batch = padded([[5, 6, 7], [8, 9, 10, 11]], extra)
                batch["candidates"] = torch.tensor([[3, 4], [5, 6]])
                candidates = candidate_logits(space.model, batch)
                last = last_logits(space.model, batch, 1)[:, 0]
                assert torch.allclose(candidates, last.gather(1, batch["candidates"]), atol=1e-5)
                found.append(candidates)
        assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"kind": "loha"}, "kind='loha' must be one of lora, prefix"),
        ({"init": "pissa"}, "init='pissa' must be one of kaiming, gaussian, orthogonal"),
        (
            {"targets": ["*qq*"]},
            r"pattern '\*qq\*' matches no linear map; names look like 'model.layers.0.self_attn.q_proj'",
        ),
    ],
)
def test_refusals(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        zl.AdapterSpace(tiny("llama"), **options)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_another_architecture(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"^peft cannot put {kind} on a Net: [^\n]+$"):
        zl.AdapterSpace(Net(), kind)


def test_one_adapter_a_model() -> None:
    """A second one would take the place of the first."""
    model = zl.AdapterSpace(tiny("llama")).model
    with pytest.raises(ValueError, match=r"^'base_model\.[^']*\.q_proj' has an adapter already; the linear maps of a model can have one$"):
        zl.AdapterSpace(model)


def test_missing_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"^AdapterSpace needs peft: pip install zolightning\[quant\]$"):
        zl.AdapterSpace(tiny("llama"))


def test_both_signs_in_one_forward(tiny_folder: str) -> None:
    """Adapters on a packed base can be probed in halves."""
    space = awake(zl.AdapterSpace(quantised(tiny_folder, "nf4")))
    assert space.pairable
    sampler = zl.GaussianSampler()
    sampler.bind(space)
    check_pair(space, sampler.directions(1, 0, 1)[0])

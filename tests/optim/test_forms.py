"""The forms of evaluating a step agree: both signs in one forward, compiled layers, and how the choice is made."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
import torch
from nets import CONFIGS, VOCABULARY, hook_count, state_bits, tiny
from torch import Tensor, nn

from zolightning.objectives import CandidateCrossEntropy, Objective, TokenCrossEntropy
from zolightning.objectives.base import BoundObjective
from zolightning.optim import ZOOptimizer, probing
from zolightning.optim.probing import Form, probe_losses
from zolightning.samplers import GaussianSampler, LowRankSampler, RademacherSampler, Sampler
from zolightning.spaces import DenseSpace, hosts, routed, swapping

PAIRABLE = ("llama", "opt", "qwen2", "gemma", "gpt2")


def candidates(rows: int = 4) -> dict[str, Any]:
    """Prompts of different lengths with two one-token candidates."""
    ids = torch.randint(3, VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    label = torch.arange(rows) % 2
    return {"input_ids": ids, "attention_mask": mask, "candidates": torch.tensor([[5, 6]] * rows), "label": label}


def answers() -> dict[str, Any]:
    """Sequences whose last tokens are scored."""
    batch = candidates()
    scored = torch.tensor([1, 2, 3, 2])
    del batch["candidates"]
    return {**batch, "scored": scored, "max_scored": 3, "example": torch.arange(4), "choice": torch.zeros(4, dtype=torch.int64)}


def losses(model: nn.Module, bound: BoundObjective, form: Form, sampler: Sampler | None = None) -> Tensor:
    space, sampler = DenseSpace(model), sampler or GaussianSampler()
    sampler.bind(space)
    probes = ZOOptimizer(space).estimator.probes
    with torch.no_grad():
        return probe_losses(space, probes, sampler.directions(0, 3, 1), 0.05, bound, form, False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", PAIRABLE)
def test_both_signs_in_one_forward(family: str, tied: bool) -> None:
    """Row losses of a paired forward are those of two probes, for candidates and for answers; nothing is left behind."""
    model = tiny(family, torch.float64, tied=tied)
    before, kinds = state_bits(model), {name: type(module) for name, module in model.named_modules()}
    for bound in (CandidateCrossEntropy().on(model, candidates()), TokenCrossEntropy().on(model, answers(), micro_batch_size=2)):
        apart = losses(model, bound, Form())
        assert float((apart[0] - apart[1]).abs()) > 1e-4
        # Norms and attention of transformers compute in float32.
        assert torch.allclose(losses(model, bound, Form(paired=True)), apart, rtol=1e-6, atol=1e-7)
    assert state_bits(model) == before
    assert hook_count(model) == 0
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_both_signs_with_a_micro_batch() -> None:
    model = tiny("llama")
    whole = losses(model, CandidateCrossEntropy().on(model, candidates()), Form(paired=True))
    parts = losses(model, CandidateCrossEntropy().on(model, candidates(), micro_batch_size=1), Form(paired=True))
    assert torch.allclose(whole, parts, atol=1e-6)


def test_an_error_in_a_paired_forward_leaves_nothing() -> None:
    model = tiny("llama")
    before, kinds = state_bits(model), [type(module) for module in model.modules()]
    space, sampler = DenseSpace(model), GaussianSampler()
    sampler.bind(space)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with torch.no_grad(), pytest.raises(KeyboardInterrupt), space.pair(sampler.directions(0, 0, 1)[0], 0.1):
        CandidateCrossEntropy().on(model, candidates()).rows(2)
    handle.remove()
    assert state_bits(model) == before
    assert hook_count(model) == 0
    assert [type(module) for module in model.modules()] == kinds
    assert all("_zolightning_twin" not in module.__dict__ for module in model.modules())


def step(model: nn.Module, batch: dict[str, Any], objective: Objective | None = None, **options: Any) -> ZOOptimizer:
    """An optimizer after one step."""
    optimizer = ZOOptimizer(DenseSpace(model), RademacherSampler(), lr=1e-2, eps=1e-2, **options)
    optimizer.step((objective or CandidateCrossEntropy()).on(model, batch))
    return optimizer


class TestChoice:
    def test_on_the_cpu_nothing_unless_asked(self) -> None:
        assert step(tiny("llama"), candidates())._form == Form()

    @pytest.mark.parametrize("family", PAIRABLE)
    def test_pairs_where_they_agree(self, family: str) -> None:
        model, plain = tiny(family), tiny(family)
        optimizer = step(model, candidates(), pair=True)
        assert optimizer._form == Form(paired=True)
        assert optimizer.losses is not None
        reference = step(plain, candidates()).losses
        assert reference is not None
        assert torch.allclose(optimizer.losses, reference, atol=1e-5)

    @pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(PAIRABLE)))
    def test_refused_where_asked_for_and_wrong(self, family: str) -> None:
        with pytest.raises(ValueError, match="pair=true does not work here"):
            step(tiny(family), candidates(), pair=True)

    def test_a_silently_wrong_forward_is_found(self) -> None:
        """A model that mixes the rows of a batch."""

        class Mixing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
                hidden = self.embed(input_ids).cumsum(1)
                hidden = hidden - hidden.mean(0, keepdim=True)
                return type("Out", (), {"logits": self.head(hidden)})

        torch.manual_seed(0)
        with pytest.raises(ValueError, match="pair=true does not work here: row losses differ by"):
            step(Mixing(), candidates(), pair=True)

    @pytest.mark.parametrize(("noise", "right"), [(1e-2, True), (0.2, False)])
    def test_rounding_is_told_from_a_wrong_forward(self, noise: float, right: bool) -> None:
        """Losses that another form rounds otherwise are compared further out, where the perturbation matters more."""

        class Rounded(CandidateCrossEntropy):
            def rows(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
                loss, weight = super().rows(model, batch)
                return loss + (noise * loss.sign() * (-1) ** torch.arange(len(loss)) if len(loss) == 8 else 0), weight

        optimizer = ZOOptimizer(DenseSpace(tiny("llama")), lr=1e-3, eps=1e-3, pair=True)
        bound = Rounded().on(optimizer.space.model, candidates())
        if right:
            optimizer.step(bound)
            return
        with pytest.raises(ValueError, match="pair=true does not work here: row losses differ by"):
            optimizer.step(bound)

    def test_one_sign_alone_is_wrong(self) -> None:
        """An error that does not grow with the distance is small beside the signs far out: without a perturbation it is all there is."""

        class HalfWrong(CandidateCrossEntropy):
            def rows(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
                loss, weight = super().rows(model, batch)
                return loss + 1e-2 * (torch.arange(len(loss)) // 4), weight

        optimizer = ZOOptimizer(DenseSpace(tiny("llama")), lr=1e-3, eps=1e-3, pair=True)
        with pytest.raises(ValueError, match=r"row losses of equal weights differ by 0\.02 between the two signs"):
            optimizer.step(HalfWrong().on(optimizer.space.model, candidates()))

    def test_a_reward_is_probed_sign_by_sign(self) -> None:
        class Held(CandidateCrossEntropy):
            several_forwards = True

        assert step(tiny("llama"), candidates(), Held(), pair=True)._form == Form()

    def test_capture_needs_a_gpu(self) -> None:
        with pytest.raises(ValueError, match="capture=true does not work here: the kernels for it run on a GPU"):
            step(tiny("llama"), candidates(), capture=True)

    def test_capture_needs_the_objectives_word(self) -> None:
        class Mine(Objective):
            def rows(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
                return CandidateCrossEntropy().rows(model, batch)

        with pytest.raises(ValueError, match="capture=true does not work here: Mine does not say that it may be captured"):
            step(tiny("llama"), candidates(), Mine(), capture=True)

    def test_compile_needs_layers(self) -> None:
        model = tiny("llama")
        model.model.layers = nn.ModuleList([model.model.layers[0]])
        with pytest.raises(ValueError, match="compile=true does not work here: there are no repeated layers"):
            step(model, candidates(), compile=True)

    def test_the_choice_survives_in_a_checkpoint(self) -> None:
        model = tiny("llama")
        optimizer = step(model, candidates(), pair=True)
        other = ZOOptimizer(DenseSpace(model), RademacherSampler(), lr=1e-2, eps=1e-2)
        other.load_state_dict(optimizer.state_dict())
        other.step(CandidateCrossEntropy().on(model, candidates()))
        assert other._form == Form(paired=True)
        again = ZOOptimizer(DenseSpace(model), RademacherSampler(), lr=1e-2, eps=1e-2, pair=False)
        again.load_state_dict(optimizer.state_dict())
        again.step(CandidateCrossEntropy().on(model, candidates()))
        assert again._form == Form()


def test_compiled_layers(caplog: pytest.LogCaptureFixture) -> None:
    """Compiled layers give the losses of plain ones, alone and in pairs; one compilation serves all layers."""
    model = tiny("llama")
    bound = CandidateCrossEntropy().on(model, candidates())
    apart = losses(model, bound, Form())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.allclose(losses(model, bound, Form(paired=True, compiled=True)), apart, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile as far as the traced graph: fast, and it is the tracing that the tests are about."""
    monkeypatch.setattr(probing, "_compiled", cache(lambda kind: torch.compile(kind.forward, backend="aot_eager")))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("kind", "large"), [("llama", True), ("opt", True), ("low rank", False)])
def test_compiled_layers_with_weights_made_where_they_are_read(kind: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers too large to be made at once, and directions of low rank: the losses of plain probes, one compilation, no trace."""
    if large:
        monkeypatch.setattr(hosts, "LAYER_BYTES", 2000)
        monkeypatch.setattr(swapping, "LAYER_BYTES", 2000)
        monkeypatch.setattr(hosts, "MATRIX_BYTES", 2000)
    model = tiny("llama" if kind == "low rank" else kind)
    bound = CandidateCrossEntropy().on(model, candidates())

    def sampler() -> Sampler:
        return LowRankSampler(2, 5) if kind == "low rank" else GaussianSampler()

    before, kinds = state_bits(model), [type(module) for module in model.modules()]
    apart = losses(model, bound, Form(), sampler())
    for paired in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert torch.allclose(losses(model, bound, Form(paired=paired, compiled=True), sampler()), apart, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
    assert [type(module) for module in model.modules()] == kinds
    assert state_bits(model) == before
    assert not routed._sources
    assert hook_count(model) == 0


@pytest.mark.usefixtures("traced")
def test_a_weight_that_the_layer_reads_itself_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ghost is NaN to all but its linear map, so that a compiled form that would miss a perturbation is not taken."""
    for module in (hosts, swapping):
        monkeypatch.setattr(module, "LAYER_BYTES", 2000)
    model = tiny("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        forward = attention.forward
        attention.forward = lambda *a, _f=forward, _m=attention, **k: (_f(*a, **k)[0] + _m.q_proj.weight.mean(), None)
    bound = CandidateCrossEntropy().on(model, candidates())
    assert losses(model, bound, Form()).isfinite().all()
    assert losses(model, bound, Form(compiled=True)).isnan().all()
    with pytest.raises(ValueError, match="compile=true does not work here: row losses of equal weights differ by nan"):
        step(model, candidates(), compile=True)

"""Steps as CUDA graphs: the bits of steps that are launched one by one, and no waiting."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nets import VOCABULARY, bits, state_bits, tiny
from torch import Tensor, nn

from zolightning.estimators import TwoPoint
from zolightning.objectives import CandidateCrossEntropy, TokenCrossEntropy
from zolightning.objectives.base import BoundObjective
from zolightning.optim import SGD, Replicas, ZOOptimizer
from zolightning.policies import FeaturePolicy, PertNN
from zolightning.samplers import GaussianSampler, LowRankSampler, PolicySampler, RademacherSampler, Sampler
from zolightning.spaces import DenseSpace, LowRankSpace, hosts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA, CUDA0 = torch.device("cuda"), torch.device("cuda", 0)
SAMPLERS = {
    "gaussian": GaussianSampler,
    "rademacher": RademacherSampler,
    "low_rank": lambda: LowRankSampler(2, 5),
    "deferred": lambda: LowRankSampler(2, 5),
    "paper": lambda: PolicySampler(PertNN(), refresh_every=3),
    "policy": lambda: PolicySampler(FeaturePolicy(hidden=4), RademacherSampler()),
}


def bound(model: nn.Module, number: int, answers: bool = False) -> BoundObjective:
    """A batch of 4 rows, 16 or 32 tokens wide, with padding in front."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, VOCABULARY, (4, 16 * (1 + number % 2)), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "label": torch.arange(4) % 2}
    if answers:
        batch |= {"scored": torch.tensor([1, 2, 3, 4]), "example": torch.arange(4), "choice": torch.zeros(4, dtype=torch.int64)}
    else:
        batch["candidates"] = torch.tensor([[5, 6]] * 4)
    batch = {name: value.to(CUDA) for name, value in batch.items()} | ({"max_scored": 4} if answers else {})
    return (TokenCrossEntropy() if answers else CandidateCrossEntropy()).on(model, batch)


def make(model: nn.Module, sampler: Sampler, **options: Any) -> ZOOptimizer:
    return ZOOptimizer(DenseSpace(model), sampler, lr=1e-3, eps=1e-2, **options)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_graph_has_the_bits_of_launches(family: str, kind: str, pair: bool) -> None:
    """Twelve steps over two widths, with a learning rate that changes, and a run that is resumed after seven."""
    if pair and family == "gpt2" and kind in ("low_rank", "deferred"):
        pytest.skip("its maps are not linear modules: they get whole matrices, one sign at a time")
    weights = {}
    for capture in (False, True):
        model = tiny(family, torch.bfloat16, tied=True).to(CUDA)
        optimizer = make(model, SAMPLERS[kind](), pair=pair, capture=capture, compile=False)
        optimizer.deferred = kind == "deferred"
        for step in range(12):
            if step == 7:
                optimizer.settle()
            if capture and step == 7:
                state = optimizer.state_dict()
                optimizer = make(model, SAMPLERS[kind]())
                optimizer.deferred = kind == "deferred"
                optimizer.load_state_dict(state)
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            optimizer.step(bound(model, step, answers=step % 3 == 0))
        assert (optimizer._form.paired, optimizer._form.captured) == (pair, capture)
        assert optimizer.steps == 12
        optimizer.settle()
        weights[capture] = state_bits(model)
    assert weights[True] == weights[False] != state_bits(tiny(family, torch.bfloat16, tied=True).to(CUDA))


@pytest.mark.parametrize("kind", ["gaussian", "policy"])
def test_slots_take_turns_in_one_graph(kind: str) -> None:
    """Ten steps over three turns, resumed inside one: the bits of launches, and one graph for each shape of batch."""

    def start(capture: bool) -> tuple[ZOOptimizer, list[BoundObjective]]:
        space = LowRankSpace(tiny("llama", torch.bfloat16).to(CUDA), rank=2, slots=2, refresh=4)
        optimizer = ZOOptimizer(space, SAMPLERS[kind](), lr=1e-3, eps=1e-2, pair=True, capture=capture, compile=False)
        return optimizer, [bound(space.model, number) for number in range(2)]

    weights = {}
    for capture in (False, True):
        optimizer, work = start(capture)
        for step in range(10):
            if step == 6:
                older = optimizer
                optimizer, work = start(capture)
                with torch.no_grad():
                    for block, saved in zip(optimizer.space.blocks, older.space.blocks, strict=True):
                        block.tensor.copy_(saved.tensor)
                optimizer.load_state_dict(older.state_dict())
            optimizer.step(work[step % 2])
        assert optimizer._form.captured == capture
        assert len(optimizer._graphs._captured) == (2 if capture else 0)
        assert all(bool(block.tensor.any()) for block in optimizer.space.blocks)
        weights[capture] = [bits(block.tensor) for block in optimizer.space.blocks]
    assert weights[True] == weights[False]


class Sometimes(CandidateCrossEntropy):
    """Not finite where the batch says so."""

    def rows(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        loss, weight = super().rows(model, batch)
        return loss * batch["factor"], weight


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "paper"])
@pytest.mark.parametrize(("family", "compile", "micro"), [("llama", False, 2), ("opt", False, None), ("llama", None, None)])
def test_moves_that_wait_have_the_bits_of_moves_at_once(
    family: str, compile: bool | None, micro: int | None, kind: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed steps of two widths that take turns, with a changing rate, weight decay, one that is not finite, looks, one that is not
    captured, and a run that is resumed; large: matrices made where they are read, and in pieces."""
    if large:
        monkeypatch.setattr(hosts, "LAYER_BYTES", 1 << 10)
        monkeypatch.setattr(hosts, "MATRIX_BYTES", 1 << 11)
    seen: dict[bool, list[Any]] = {False: [], True: []}
    for deferred, found in seen.items():
        torch._dynamo.reset()
        model, objective = tiny(family, torch.bfloat16, tied=family == "opt").to(CUDA), Sometimes()

        def start(model: nn.Module = model, deferred: bool = deferred) -> ZOOptimizer:
            optimizer = make(model, SAMPLERS[kind](), pair=True, capture=True, compile=compile, rule=SGD(0.01))
            optimizer.deferred = deferred
            return optimizer

        optimizer = start()
        for step in range(14):
            if step == 9:
                state = optimizer.state_dict()
                optimizer = start()
                optimizer.load_state_dict(state)
            factor = torch.full((4,), torch.nan if step == 5 else 1.0, device=CUDA)
            work = objective.on(model, {**bound(model, step).batch, "factor": factor}, micro)
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            optimizer.step((lambda work=work: work()) if step == 7 else work)  # a plain closure is not captured
            assert optimizer.losses is not None
            found.append(bits(optimizer.losses))
            if step in (3, 11):
                optimizer.settle()
                found.append(state_bits(model))
            if deferred:
                assert optimizer.space._late.waits == (step not in (3, 7, 11))  # type: ignore[attr-defined]
        assert len(optimizer._graphs._captured) == 2
        assert optimizer.skipped == 1
        optimizer.settle()
        found.append(state_bits(model))
    assert seen[True] == seen[False]
    assert seen[True][-1] != state_bits(tiny(family, torch.bfloat16, tied=family == "opt").to(CUDA))


def test_a_move_waits_until_somebody_looks() -> None:
    """The weights stand still in the first step; several directions never wait."""
    model = tiny("llama", torch.float16).to(CUDA)
    optimizer, work, before = make(model, RademacherSampler(), compile=False), bound(model, 0), state_bits(model)
    optimizer.deferred = True
    optimizer.step(work)
    assert state_bits(model) == before
    optimizer.settle()
    assert state_bits(model) != before
    optimizer = ZOOptimizer(DenseSpace(model), None, TwoPoint(2), lr=1e-3, eps=1e-2, compile=False)
    optimizer.deferred = True
    optimizer.step(work)
    now = state_bits(model)
    optimizer.settle()
    assert state_bits(model) == now


@pytest.mark.parametrize("kind", ["gaussian", "low_rank", "late"])
def test_nothing_waits(kind: str) -> None:
    """Fifty captured (and compiled) steps with every wait an error; ends of windows too."""
    model = tiny("llama", torch.bfloat16).to(CUDA)
    optimizer = make(model, LowRankSampler(2, 20) if kind == "low_rank" else GaussianSampler())
    optimizer.deferred = kind != "gaussian"
    work = [bound(model, number) for number in range(2)]
    for one in work:
        optimizer.step(one)
    assert (optimizer._form.captured, optimizer._form.paired, optimizer._form.compiled) == (True, True, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(50):
            optimizer.step(work[step % 2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped == 0


def test_compiled_steps_repeat_bit_for_bit() -> None:
    """Two runs from the start, the second after the compiler's memory was wiped."""
    results = []
    for _ in range(2):
        torch._dynamo.reset()
        model = tiny("llama", torch.bfloat16).to(CUDA)
        optimizer = make(model, GaussianSampler())
        for step in range(8):
            optimizer.step(bound(model, step))
        results.append(state_bits(model))
    assert results[0] == results[1]


def test_steps_that_are_not_finite_are_skipped_in_graphs_too() -> None:
    model = tiny("llama", torch.float32).to(CUDA)
    optimizer = make(model, GaussianSampler(), compile=False, max_skipped=40)
    optimizer.step(bound(model, 0))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = state_bits(model)

    def many() -> None:
        for _ in range(500):
            optimizer.step(bound(model, 0))

    with pytest.raises(
        RuntimeError, match=r"steps in a row \(to step \d+\) gave a loss that is not finite; the weights are those of step 1"
    ):
        many()
    assert state_bits(model) == before


def test_an_objective_that_waits_is_launched_step_by_step() -> None:
    class Waiting(CandidateCrossEntropy):
        def rows(self, model: nn.Module, batch: Any) -> Any:
            loss, weight = super().rows(model, batch)
            return (loss, weight) if float(loss.sum()) > 0 else (loss * 0, weight)

    model = tiny("llama", torch.bfloat16).to(CUDA)
    optimizer = make(model, GaussianSampler())
    optimizer.step(Waiting().on(model, bound(model, 0).batch))
    assert not optimizer._form.captured
    assert optimizer._form.paired


def test_nccl_inside_a_graph(tmp_path: Path) -> None:
    """One replica alone: the gather is captured, the bits are those without it, and the group can be destroyed afterwards."""
    weights = []
    for alone in (True, False):
        model = tiny("llama", torch.bfloat16).to(CUDA)
        optimizer = make(model, GaussianSampler(), pair=True, capture=True, compile=False)
        if not alone:
            dist.init_process_group("nccl", f"file://{tmp_path}/store", timedelta(seconds=60), 1, 0, device_id=CUDA0)
            optimizer.replicas = Replicas("directions")
        for step in range(4):
            optimizer.step(bound(model, step))
        weights.append(state_bits(model))
    optimizer.release()
    optimizer.step(bound(model, 4))  # captured anew
    optimizer.release()
    dist.destroy_process_group()
    assert weights[0] == weights[1] != state_bits(model)

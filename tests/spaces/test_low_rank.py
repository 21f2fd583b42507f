"""LowRankSpace: directions in the span of fixed bases that take turns, beside a base that keeps its bits."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, bits, lm_closure, state_bits, tiny
from quantised import check_pair, packed_bits, quantised, scale_bits
from torch import Tensor

import zolightning as zl
from zolightning.journal import Recorder, read
from zolightning.noise import GaussianNoise, Key
from zolightning.spaces.low_rank import Slots, bank
from zolightning.spaces.paired import pair, unpair
from zolightning.testing import DeviceOnly, check_space

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def layer_of(space: zl.Space) -> Any:
    return space.model.get_submodule(Q)


def delta(space: zl.Space) -> Tensor:
    """What is added to the first query map."""
    return layer_of(space).get_delta_weight("default").detach().clone()


def slots_moved(space: zl.LowRankSpace, before: list[bytes]) -> set[str]:
    """Slots of which all blocks have changed; no other block may have."""
    changed = [(block.name.rpartition(".")[2], bits(block.tensor) != old) for block, old in zip(space.blocks, before, strict=True)]
    for slot in {name for name, _ in changed}:
        assert len({moved for name, moved in changed if name == slot}) == 1, f"{slot} moved in part"
    return {name for name, moved in changed if moved}


def test_slots_in_halves_for_sizes_that_vary() -> None:
    """Compiled once, the first half of the rows meets the first matrix, whatever their length."""
    torch.manual_seed(0)
    slots = Slots([torch.randn(5, 2), torch.randn(5, 2)])
    pair([slots])
    slots._parameters.update({name: torch.stack([part, -part]).detach() for name, part in slots.named_parameters()})
    first, second = slots.weight
    compiled = torch.compile(lambda x: slots(x), backend="aot_eager", dynamic=True)
    for length in (3, 5):
        x = torch.randn(4, length, 4)
        assert torch.allclose(compiled(x), torch.cat([x[:2] @ first.T, x[2:] @ second.T]), atol=1e-6)
    unpair([slots])
    assert type(slots) is Slots


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_common(tiny_folder: str, base: str) -> None:
    """The common test; then slots take turns, are the same bits wherever a run is taken up, and leave the base as it is."""
    model = quantised(tiny_folder, base, "bfloat16")
    dense, packed, scales = state_bits(model), packed_bits(model), scale_bits(model)
    space = zl.LowRankSpace(model, rank=2, slots=2, refresh=2, targets=["*.0.*.q_proj", "*.1.*.down_proj"])
    assert {(block.dtype, block.tensor.shape[1]) for block in space.blocks} == {(torch.float32, 2)}
    closure = lm_closure(space.model)
    check_space(space, closure, 0.1)
    optimizer, turns = zl.ZOOptimizer(space, lr=1e-2, eps=1e-2), []
    for _ in range(5):
        before = [bits(block.tensor) for block in space.blocks]
        optimizer.step(closure)
        turns.append(slots_moved(space, before))
    assert turns == [{"slot0"}, {"slot0"}, {"slot1"}, {"slot1"}, {"slot0"}]
    assert (packed_bits(model), scale_bits(model)) == (packed, scales)
    after = {name.replace("base_layer.", ""): value for name, value in state_bits(model).items() if "lora_" not in name}
    assert after == dense


class TestBank:
    def test_directions_lie_in_the_span_of_the_slot(self) -> None:
        """A probe adds ``eps V U_j`` with the noise of the block as V, and an update stays in the same span."""
        space = zl.LowRankSpace(tiny("llama"), rank=3, slots=2, refresh=1, seed=5)
        bases = bank("model.layers.0.self_attn.q_proj", 3, 2, 32, 5, torch.device("cpu")).split(3)
        optimizer = zl.ZOOptimizer(space, lr=1e-2, eps=1e-2, seed=4)
        for step in range(3):
            block = space.blocks[step % 2]
            assert block.name == f"{Q}.lora_B.default.slot{step % 2}"
            before, basis = delta(space), bases[step % 2]
            along = optimizer._directions()[0]
            with torch.no_grad(), space.probe(along, 0.1, hold=True):
                probed = delta(space) - before
            v = GaussianNoise(Key(4, block.id, step)).draw(0, block.numel, torch.device("cpu")).view(32, 3)
            assert torch.allclose(probed, 0.1 * v @ basis, atol=1e-6)
            optimizer.step(lm_closure(space.model))
            moved = delta(space) - before
            assert float(moved.norm()) > 1e-4
            inside = moved @ torch.linalg.pinv(basis) @ basis
            assert torch.allclose(inside, moved, atol=1e-6)

    def test_second_moment(self) -> None:
        """``E[z z^T]``: 1 on the diagonal for every bank, and the identity over all banks."""
        draws, rank, (m, n), device = 20_000, 2, (2, 3), torch.device("cpu")
        bases = bank("map", rank, draws, n, 1, device).view(draws, rank, n)
        assert torch.allclose(bases.square().sum(1), torch.ones(draws, n))
        v = GaussianNoise(Key(0, 1, 2)).draw(0, draws * m * rank, device).view(draws, m, rank)
        z = (v @ bases).flatten(1).double()
        products = torch.einsum("ni,nj->nij", z, z)
        error = products.std(0) / draws**0.5
        assert bool(((products.mean(0) - torch.eye(m * n, dtype=torch.float64)).abs() < 5 * error).all())

    def test_a_pure_function_of_seed_and_name(self) -> None:
        """More slots go on where fewer end; packed or not, A is the bank; no global random state is touched."""
        device = torch.device("cpu")
        two, three = bank("a", 4, 2, 10, 7, device), bank("a", 4, 3, 10, 7, device)
        assert torch.equal(three[:8], two)
        assert not torch.equal(two, bank("b", 4, 2, 10, 7, device))
        assert not torch.equal(two, bank("a", 4, 2, 10, 8, device))
        model, state = tiny("llama"), torch.get_rng_state()
        space = zl.LowRankSpace(model, rank=2, slots=3, seed=7)
        assert torch.equal(torch.get_rng_state(), state)
        layer = layer_of(space)
        assert torch.equal(layer.lora_A["default"].weight, bank("model.layers.0.self_attn.q_proj", 2, 3, 32, 7, device))
        assert layer.scaling["default"] == 1

    def test_starts_as_the_base(self) -> None:
        model = tiny("llama")
        with torch.no_grad():
            expected = float(lm_closure(model)())
            assert float(lm_closure(zl.LowRankSpace(model).model)()) == expected

    def test_no_other_space_moves_it(self) -> None:
        space = zl.LowRankSpace(tiny("llama"))
        assert not any("lora_A" in block.name for block in zl.DenseSpace(space.model).blocks)

    def test_state_dict(self) -> None:
        """Outwards the slots are one matrix, which goes in again; one of another shape or none does not."""
        first, second = (zl.LowRankSpace(tiny("llama"), rank=2, slots=2) for _ in range(2))
        with torch.no_grad():
            for block in first.blocks:
                block.tensor.normal_()
        state = first.model.state_dict()
        name = f"{Q}.lora_B.default.weight"
        assert torch.equal(state[name], torch.cat([block.tensor for block in first.blocks[:2]], dim=1))
        assert not any("slot" in key for key in state)
        second.model.load_state_dict(state)
        assert [bits(block.tensor) for block in second.blocks] == [bits(block.tensor) for block in first.blocks]
        with pytest.raises(RuntimeError, match=rf"size mismatch for {name}: \(32, 3\), expected \(32, 4\)"):
            second.model.load_state_dict({**state, name: torch.zeros(32, 3)})
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            second.model.load_state_dict({key: value for key, value in state.items() if key != name})


class TestTurns:
    def test_they_follow_from_the_step_on_the_device(self) -> None:
        space = zl.LowRankSpace(tiny("llama"), rank=2, slots=3, refresh=4)
        names = [int(block.name[-1]) for block in space.blocks]
        for step in (0, 3, 4, 11, 12, 4_000_000_003):
            clock = torch.tensor(step)
            with DeviceOnly():
                active = space.active(clock)
            assert active.tolist() == [float(slot == step // 4 % 3) for slot in names]
        optimizer = zl.ZOOptimizer(space)
        optimizer._clock.fill_(4)  # a captured step is replayed with a clock that has moved on; the host's number is that of its capture
        assert torch.equal(optimizer._directions()[0].scales, space.active(torch.tensor(4)))

    def test_weight_decay_is_for_all(self) -> None:
        space = zl.LowRankSpace(tiny("llama"), rank=2, slots=2)
        with torch.no_grad():
            space.blocks[1].tensor.fill_(1.0)
        zl.ZOOptimizer(space, lr=1e-2, eps=1e-2, rule=zl.SGD(weight_decay=0.5)).step(lm_closure(space.model))
        assert torch.equal(space.blocks[1].tensor, torch.full((32, 2), 1 - 0.005))

    def test_the_journal_makes_the_same_weights(self, tmp_path: Path) -> None:
        """Its rows hold the scales of the slot that moved, so replay needs to know nothing of slots; the optimizer repeats them too."""

        def make() -> zl.ZOOptimizer:
            space = zl.LowRankSpace(tiny("llama"), rank=2, slots=2, refresh=3)
            return zl.ZOOptimizer(space, zl.RademacherSampler(), zl.TwoPoint(2), lr=1e-2, eps=1e-2, seed=9)

        optimizer = make()
        recorder = Recorder(tmp_path / "journal.zo", optimizer, "tiny")
        for _ in range(8):
            optimizer.step(lm_closure(optimizer.space.model))
        recorder.drain()
        recorder.close()
        rows = [entry.row for entry in read(tmp_path / "journal.zo").entries]
        assert [row.scales[:2].tolist() for row in rows] == [[1, 0]] * 3 + [[0, 1]] * 3 + [[1, 0]] * 2
        expected = [bits(block.tensor) for block in optimizer.space.blocks]
        again = make()
        assert zl.replay(tmp_path / "journal.zo", again.space.model) == 8
        assert [bits(block.tensor) for block in again.space.blocks] == expected
        repeated = make()
        repeated.repeat(rows)
        for _ in range(8):
            repeated.step(lambda: float("nan"))
        assert [bits(block.tensor) for block in repeated.space.blocks] == expected

    def test_in_a_union(self) -> None:
        """Norms move in every step, slots in their turn."""
        norms = partial(zl.DenseSpace, include=["model.norm.weight"])
        space = zl.UnionSpace(tiny("llama"), [norms, partial(zl.LowRankSpace, rank=2, slots=2, refresh=1)])
        assert zl.UnionSpace(tiny("llama"), [norms]).active(torch.tensor(0)) is None
        for step in range(2):
            active = space.active(torch.tensor(step))
            assert active is not None
            assert active.tolist() == [1.0] + [1.0 - step, float(step)] * 4
        optimizer = zl.ZOOptimizer(space, lr=1e-2, eps=1e-2)
        for slot in range(2):
            before = [bits(block.tensor) for block in space.blocks]
            optimizer.step(lm_closure(space.model))
            moved = {b.name.rpartition(".")[2] for b, old in zip(space.blocks, before, strict=True) if bits(b.tensor) != old}
            assert moved == {"weight", f"slot{slot}"}


@pytest.mark.parametrize("more", [[], [partial(zl.DenseSpace, include=["*norm*"])]], ids=["alone", "with norms"])
def test_both_signs_in_one_forward(tiny_folder: str, more: list[Any]) -> None:
    """On a packed base; what does not take its turn is not perturbed in either half."""
    space = zl.UnionSpace(quantised(tiny_folder, "nf4"), [partial(zl.LowRankSpace, rank=2, slots=2), *more])
    assert space.pairable
    optimizer = zl.ZOOptimizer(space)
    with torch.no_grad():
        for block in space.blocks:
            block.tensor.normal_(generator=torch.Generator().manual_seed(3))
    along = optimizer._directions()[0]
    assert along.scales[:2].tolist() == [1, 0]
    check_pair(space, along)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"refresh": 0}, "refresh=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be between 0 and 2\*\*64 - 1"),
        ({"rank": 5}, r"rank=5 times slots=4 is larger than a side of 'model\.layers\.0\.self_attn\.v_proj' \(16 x 32\)"),
        ({"rank": 17, "slots": 1}, r"rank=17 times slots=1 is larger than a side of 'model\.layers\.0\.self_attn\.v_proj' \(16 x 32\)"),
        (
            {"targets": ["*qq*"]},
            r"pattern '\*qq\*' matches no linear map; names look like 'model.layers.0.self_attn.q_proj'",
        ),
    ],
)
def test_refusals(options: dict[str, Any], text: str) -> None:
    """The model is as it was."""
    model = tiny("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"^{text}$"):
        zl.LowRankSpace(model, **options)
    assert [name for name, _ in model.named_modules()] == names


def test_another_architecture() -> None:
    with pytest.raises(ValueError, match=r"^peft cannot put a low-rank bank on a Net: [^\n]+$"):
        zl.LowRankSpace(Net())


def test_missing_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"^LowRankSpace needs peft: pip install zolightning\[quant\]$"):
        zl.LowRankSpace(tiny("llama"))

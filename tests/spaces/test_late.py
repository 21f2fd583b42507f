"""Moves that wait for the next step's probes: the weights and losses of moves that are made at once, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from nets import VOCABULARY, Net, bits, hook_count, state_bits, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning import DenseSpace, GaussianSampler, LowRankSampler, RademacherSampler, UnionSpace, kernels
from zolightning.samplers import Direction, Sampler
from zolightning.spaces import Space, hosts

Forward = Callable[[nn.Module], Tensor]
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()


def tokens(model: nn.Module, width: int = 8, rows: int = 4) -> Tensor:
    """All logits of some rows: an embedding at rows, everything else in full."""
    ids = torch.randint(3, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(width))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def candidates(model: Any) -> Tensor:
    """The head at rows too."""
    head = model.get_output_embeddings()
    head.__dict__["forward"] = lambda hidden: hidden @ F.embedding(torch.tensor([5, 6]), head.weight).mT
    try:
        return tokens(model)
    finally:
        del head.__dict__["forward"]


def micro_batches(model: nn.Module) -> Tensor:
    """Everything is read twice."""
    return torch.cat([tokens(model), tokens(model, 6)], dim=1)


def embedding(model: nn.Module) -> Tensor:
    """Most blocks are not read."""
    return model.get_input_embeddings()(torch.tensor([[3, 4], [4, 9]]))  # type: ignore[operator]


FORWARDS: dict[str, Forward] = {f.__name__: f for f in (tokens, candidates, micro_batches, embedding)}


class Steps:
    """Steps whose weights are given, each with a probe of both signs (or one) in front.

    Args:
        space: What moves.
        waits: Whether a move may wait for the next step.
    """

    def __init__(self, space: Space, waits: bool, sampler: Sampler | None = None) -> None:
        self.space, self.waits, self.sampler = space, waits, sampler or GaussianSampler()
        self.sampler.bind(space)
        space.deferred = waits
        self.clock: Tensor | None = None

    def direction(self, step: int, seed: int = 3, named: int | None = None) -> Direction:
        direction = self.sampler.directions(seed, step if named is None else named, 1, self.clock)[0]
        return replace(direction, scales=torch.linspace(0.5, 1.5, len(self.space.blocks)) + 0.1 * step)

    @torch.no_grad()
    def take(self, step: int, forward: Forward, seed: int = 3, valid: bool = True, signs: int = 2, named: int | None = None) -> bytes:
        """The bits of what the step has seen; ``named``: another number in the keys."""
        direction, space = self.direction(step, seed, named), self.space
        space.prepare(self.sampler, seed, step)
        with space.walk(self.sampler, seed, step):
            with space.pair(direction, 0.01) if signs == 2 else space.probe(direction, 0.01):
                seen = forward(space.model)
            weight = torch.tensor([0.01 * (step + 1)] if valid else [torch.nan])
            space.move([direction], weight, torch.tensor(0.01 * step), torch.tensor(valid))
        return bits(seen)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize(("family", "tied", "large"), [("llama", False, True), ("opt", True, False)])
def test_bits(family: str, tied: bool, large: bool, forward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps whose forwards read other blocks, one skipped, one probe of a single sign; large: matrices one by one and in pieces."""
    if large:
        monkeypatch.setattr(hosts, "LAYER_BYTES", 1 << 10)
        monkeypatch.setattr(hosts, "MATRIX_BYTES", 1 << 11)
    seen: dict[bool, list[Any]] = {False: [], True: []}
    for waits, found in seen.items():
        model = tiny(family, torch.bfloat16, tied)
        steps = Steps(DenseSpace(model), waits, RademacherSampler() if large else GaussianSampler())
        for step, way in enumerate((tokens, FORWARDS[forward], FORWARDS[forward], tokens, FORWARDS[forward])):
            before = state_bits(model)
            found.append(steps.take(step, way, valid=step != 2, signs=1 if step == 3 else 2))
            if waits and step == 0:
                assert state_bits(model) == before  # it does wait
        assert hook_count(model) == 0
        steps.space.settle(3, 5)
        found.append(state_bits(model))
        steps.space.settle(3, 5)
        found.append(state_bits(model))
    assert seen[True] == seen[False]
    assert seen[True][-1] != state_bits(tiny(family, torch.bfloat16, tied))


def test_weights_that_were_moved_elsewhere() -> None:
    """The move that waits is made where the weights are now, before they are located anew."""
    ends = []
    for waits in (False, True):
        model = tiny("llama", torch.bfloat16)
        steps = Steps(DenseSpace(model), waits)
        for step in range(2):
            steps.take(step, tokens)
        before = state_bits(model)
        for block in steps.space.blocks:
            block.tensor.data = block.tensor.data.clone()
        steps.space.locate()
        assert (state_bits(model) != before) == waits
        ends.append(state_bits(model))
    assert ends[0] == ends[1]


class Tied(nn.Module):
    """Two layers that share a matrix, so that the second one's blocks are made together with one that has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)) for _ in range(2))
        self.layers[1][0].weight = self.layers[0][0].weight  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_block_of_two_layers_moves_once() -> None:
    seen: dict[bool, list[Any]] = {False: [], True: []}
    for waits, found in seen.items():
        torch.manual_seed(1)
        steps = Steps(DenseSpace(Tied().bfloat16().eval()), waits)
        found += [steps.take(step, lambda model: model(X)) for step in range(3)]
        steps.space.catch_up()
        found.append(state_bits(steps.space.model))
    assert seen[True] == seen[False]


def test_full_reads_move_in_the_same_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of both kinds for each layer; passes of their own for what is looked up by rows, and for what is not read."""
    passes: list[tuple[str, int]] = []
    advance, make = kernels.Pack.advance, kernels.Pack.make

    def counted_advance(pack: kernels.Pack, *rest: Any) -> list[Tensor]:
        passes.append(("advance", len(pack.tensors)))
        with monkeypatch.context() as inner:
            inner.setattr(kernels.Pack, "make", make)  # which it is made of in plain torch
            return advance(pack, *rest)

    def counted_make(pack: kernels.Pack, move: kernels.Update) -> None:
        passes.append(("make", len(pack.tensors)))
        make(pack, move)

    monkeypatch.setattr(kernels.Pack, "advance", counted_advance)
    monkeypatch.setattr(kernels.Pack, "make", counted_make)
    steps = Steps(DenseSpace(tiny("llama")), True)
    blocks, layer = len(steps.space.blocks), 9
    for step in range(2):
        passes.clear()
        steps.take(step, candidates)
        assert passes == [("make", 1), ("advance", layer), ("advance", layer), ("advance", 1), ("make", 1)]
    passes.clear()
    steps.take(2, embedding)
    assert passes == [("make", 1), ("make", blocks - 1)]
    passes.clear()
    steps.space.catch_up()
    steps.space.catch_up()
    assert passes == [("make", blocks)]


def test_whoever_is_no_captured_step_finds_the_moves_made() -> None:
    """A plain probe, a plain move, a step with another seed or sampler, and dropping."""
    seen: dict[bool, list[Any]] = {False: [], True: []}
    for waits, found in seen.items():
        model = tiny("opt", torch.float16)
        steps = Steps(DenseSpace(model), waits)
        steps.take(0, tokens)
        with torch.no_grad(), steps.space.probe(steps.direction(1), 0.01):
            found.append(bits(tokens(model)))
        found.append(state_bits(model))
        steps.take(1, tokens)
        found.append(steps.take(2, tokens, seed=4))
        with torch.no_grad():
            steps.space.move([steps.direction(3)], torch.ones(1), 0.0, torch.tensor(True))
        found.append(state_bits(model))
        steps.take(4, tokens)
        other = Steps(steps.space, waits, RademacherSampler())
        found.append(other.take(5, tokens))
        other.space.catch_up()
        found.append(state_bits(model))
        other.take(6, tokens, valid=not waits)
        if waits:
            other.take(7, tokens)
            with torch.no_grad():
                for block, saved in zip(other.space.blocks, tiny("opt", torch.float16).parameters(), strict=True):
                    block.tensor.copy_(saved)
            other.space.drop()
            other.space.settle(3, 8)
            assert state_bits(model) == state_bits(tiny("opt", torch.float16))
    assert seen[True] == seen[False]


def test_spaces_together_and_spaces_with_moves_of_their_own() -> None:
    """A union's parts each keep theirs; a space that does more than move is never deferred."""

    class Positive(DenseSpace):
        def move(self, *arguments: Any) -> None:
            super().move(*arguments)
            torch._foreach_clamp_min_([block.tensor for block in self.blocks], 0.0)

    seen: dict[bool, list[Any]] = {False: [], True: []}
    for waits, found in seen.items():
        model = Net(torch.bfloat16).eval()
        parts = [partial(DenseSpace, include=["first.*"]), partial(Positive, include=["last.*"])]
        steps = Steps(UnionSpace(model, parts), waits)
        for step in range(3):
            before = state_bits(model)
            found.append(steps.take(step, lambda model: model(X)))
            changed = {name for name, value in state_bits(model).items() if value != before[name]}
            if waits and step == 0:
                assert changed == {"last.weight", "last.bias"}
        steps.space.settle(3, 3)
        found.append(state_bits(model))
    assert seen[True] == seen[False]


def test_the_kernels_go_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a graph, whose keys stay those of the step that was captured."""
    pytest.importorskip("triton")
    seen: dict[bool, list[Any]] = {False: [], True: []}
    for waits, found in seen.items():
        monkeypatch.setattr(kernels.pack, "FUSED_DEVICES", {"cuda", "cpu"} if waits else set())
        model, clock = Net(torch.bfloat16).eval(), torch.tensor(0)
        steps = Steps(DenseSpace(model, exclude=["scale"]), waits, RademacherSampler())
        for step in range(2):
            clock.fill_(step)
            steps.clock = clock if waits else None
            found.append(steps.take(step, lambda model: model(X), named=0 if waits else step))
        steps.space.catch_up()
        found.append(state_bits(model))
    assert seen[True] == seen[False]


def test_low_rank_moves_wait_in_their_own_way() -> None:
    steps = Steps(DenseSpace(tiny("llama")), True, LowRankSampler(2, 5))
    for step in range(2):
        steps.take(step, tokens)
    assert steps.space._late is None

"""Directions of low rank: what a probe computes, what a step moves, and that no matrix is made."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from nets import bits, lm_closure, state_bits, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning import DenseSpace, GaussianSampler, LowRankSampler, TwoPoint, UnionSpace, ZOOptimizer, kernels
from zolightning.blocks import Block
from zolightning.noise import Key, LowRankNoise, Noise
from zolightning.optim import SGD
from zolightning.samplers import Direction, Sampler
from zolightning.spaces import hosts
from zolightning.testing import check_space


class Dense(LowRankSampler):
    """The same directions as dense noise, which a space perturbs in full."""

    class Draw(Noise):
        inner: LowRankNoise

        def draw(self, start: int, count: int, device: torch.device) -> Tensor:
            return self.inner.draw(start, count, device)

    def noise(self, block: Block, key: Key) -> Noise:
        noise = super().noise(block, key)
        if not isinstance(noise, LowRankNoise):
            return noise
        drawn = self.Draw(key)
        object.__setattr__(drawn, "inner", noise)
        return drawn


def along(sampler: LowRankSampler, space: DenseSpace, step: int = 7) -> Direction:
    sampler.bind(space)
    return sampler.directions(3, step, 1)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_probe_sees_the_direction(family: str, tied: bool) -> None:
    """In float64 the side path computes what the perturbed matrices compute; other readers of a matrix get it whole."""
    model = tiny(family, torch.float64, tied)
    closure, losses = lm_closure(model), []
    for kind in (LowRankSampler, Dense):
        for hold in (False, True):
            space = DenseSpace(model)
            with torch.no_grad(), space.probe(along(kind(3, 5), space), 1e-2, hold):
                losses.append(float(closure()))
    with torch.no_grad():
        signal = abs(losses[0] - float(closure()))
    assert signal > 1e-4
    assert losses == pytest.approx([losses[-1]] * 4, rel=0, abs=1e-5 * signal)  # noise is float32


@pytest.mark.parametrize(("copies", "dtype"), [(1, torch.bfloat16), (2, torch.bfloat16), (2, torch.float32)])
def test_nothing_of_the_size_of_a_matrix_is_made(copies: int, dtype: torch.dtype) -> None:
    """Beside the weights themselves only tensors smaller than the smallest matrix exist in a probe of linear maps and embeddings."""
    model = tiny("llama", dtype)
    space = DenseSpace(model, include=["*proj.weight", "*embed*", "lm_head.weight"])
    direction = along(LowRankSampler(2, 5), space)
    ids, sizes = torch.tensor([[5, 6], [7, 8]][: 2 * copies]), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.untyped_storage().nbytes() for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, Tensor))
            return out

    weights = {b.tensor.untyped_storage().nbytes() for b in space.blocks}
    with torch.no_grad(), space.probe(direction, 1e-2) if copies == 1 else space.pair(direction, 1e-2), Sizes():
        model(input_ids=ids, use_cache=False)
    assert max(size for size in sizes if size not in weights) < min(weights)


def test_both_signs_at_once() -> None:
    model = tiny("llama", torch.float64)
    space = DenseSpace(model)
    direction, ids = along(LowRankSampler(3, 5), space), torch.randint(3, 60, (4, 6))
    with torch.no_grad():
        with space.pair(direction, 1e-2):
            both = model(input_ids=torch.cat([ids, ids]), use_cache=False).logits
        for sign, half in zip((1, -1), both.chunk(2), strict=True):
            with space.probe(direction, sign * 1e-2):
                assert torch.allclose(model(input_ids=ids, use_cache=False).logits, half, atol=1e-12)


def run(model: nn.Module, sampler: LowRankSampler, steps: int, queries: int = 1, **options: bool) -> list[Tensor]:
    optimizer = ZOOptimizer(DenseSpace(model), sampler, TwoPoint(queries), lr=1e-3, eps=1e-3, seed=4, rule=SGD(0.01), **options)
    for _ in range(steps):
        optimizer.step(lm_closure(model))
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("queries", [1, 3])
def test_steps_are_those_of_dense_noise(queries: int) -> None:
    """Over three windows; the weights are current after every step."""
    one, two = (run(tiny("llama", torch.float64), kind(2, 3), 8, queries) for kind in (LowRankSampler, Dense))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(one, two, strict=True))  # float32 noise, summed in another order
    start = [p.detach() for p in tiny("llama", torch.float64).parameters()]
    assert all(bool((a != b).any()) for a, b in zip(one, start, strict=True))


def test_a_window_has_one_basis() -> None:
    """Moves of one window lie in the span of its basis, and another window has another."""
    ranks = []
    for steps in (5, 10):
        model = tiny("llama", torch.float64)
        before = model.lm_head.weight.detach().clone()
        run(model, LowRankSampler(2, 5), steps)
        ranks.append(int(torch.linalg.matrix_rank(model.lm_head.weight.detach() - 0.99999**steps * before, tol=1e-9)))
    # weight decay (1e-5 a step) leaves a trace of the weights themselves, below the tolerance
    assert ranks == [2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_common(dtype: torch.dtype) -> None:
    """Probes are read-only, errors leave no trace, every block responds and moves; also in a union."""

    model = tiny("llama", dtype)
    sampler = LowRankSampler(2, 5)
    parts = [partial(DenseSpace, include=["*mlp*"]), partial(DenseSpace, exclude=["*mlp*"])]
    for space in (DenseSpace(model), UnionSpace(model, parts)):
        check_space(space, lm_closure(model), eps=3e-2, sampler=sampler)


def test_a_large_matrix_is_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces have the bits of the whole: one sign, both signs, with a bias."""
    monkeypatch.setattr(hosts, "LAYER_BYTES", 0)
    model = nn.Linear(16, 40).eval()
    x, outputs = torch.eye(16), []  # its products are exact, in whatever order they are summed
    for limit in (1 << 28, 1000):
        monkeypatch.setattr(hosts, "MATRIX_BYTES", limit)
        space, sampler = DenseSpace(model), GaussianSampler()
        sampler.bind(space)
        direction = sampler.directions(1, 2, 1)[0]
        assert len(hosts.pieces(0, space.blocks[0])) == (1 if limit > 1000 else 5)
        with torch.no_grad():
            with space.probe(direction, 1e-2):
                outputs.append(model(x))
            with space.pair(direction, 1e-2):
                outputs.append(model(torch.cat([x, x])))
    assert bits(outputs[0]) == bits(outputs[2]) == bits(outputs[1][:16])
    assert bits(outputs[1]) == bits(outputs[3])


@pytest.mark.parametrize(("argument", "value"), [("rank", 0), ("window", 0)])
def test_arguments(argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{argument}=0 must be at least 1"):
        LowRankSampler(**{argument: value})


@pytest.mark.parametrize("sampler", [GaussianSampler(), LowRankSampler(2, 5)], ids=["gaussian", "low_rank"])
def test_matrices_read_in_other_ways(sampler: Sampler) -> None:
    """By keyword, inside a list, and twice in one module."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
            self.head = self.one

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, weight=torch.cat([self.one.weight, self.two.weight])) @ self.read()

        def read(self) -> Tensor:
            return F.linear(input=torch.eye(6, dtype=torch.float64), weight=self.head.weight).sum(0)[:, None].expand(5, 2).repeat(2, 1)

    torch.manual_seed(0)
    model = Odd().double().eval()
    space, x = DenseSpace(model), torch.randn(3, 6, dtype=torch.float64)
    check_space(space, lambda: model(x).square().mean(), sampler=sampler)


def test_an_error_half_way_through_a_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was brought in is not brought in again."""
    one, two = (ZOOptimizer(DenseSpace(tiny("llama", torch.float64)), LowRankSampler(2, 50), lr=1e-3, eps=1e-3) for _ in range(2))
    for optimizer in (one, two):
        optimizer.deferred = True
        for _ in range(3):
            optimizer.step(lm_closure(optimizer.space.model))
    one.settle()
    fold, calls = kernels.fold, iter([None, None, MemoryError()])

    def failing(*arguments: Any) -> None:
        if error := next(calls, None):
            raise error
        fold(*arguments)

    monkeypatch.setattr(kernels, "fold", failing)
    with pytest.raises(MemoryError):
        two.settle()
    two.settle()
    assert state_bits(one.space.model) == state_bits(two.space.model)

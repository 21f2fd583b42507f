"""The noise of a block follows its name, the seed, the step and the query, and nothing else."""

from __future__ import annotations

import pytest
import torch
from nets import Net, bits
from torch import Tensor, nn

from zolightning import noise
from zolightning.estimators import TwoPoint
from zolightning.optim import ZOOptimizer
from zolightning.samplers import GaussianSampler, RademacherSampler, Sampler
from zolightning.spaces import DenseSpace

SAMPLERS = [GaussianSampler, RademacherSampler]


def moves(model: nn.Module, sampler: Sampler, queries: int = 1, **patterns: list[str]) -> dict[str, Tensor]:
    """The direction of each block, read off the weights: one step from zero weights on a loss of slope one along it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    space = DenseSpace(model, **patterns)
    sampler.bind(space)
    directions = sampler.directions(11, 5, queries)
    weights = torch.zeros(queries, dtype=space.compute_dtype)
    weights[-1] = 1.0
    with torch.no_grad():
        space.move(directions, weights, 0.0, torch.tensor(True))
    return {block.name: block.tensor.detach().float().clone() for block in space.blocks}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_freezing_changes_no_other_block(sampler: type[Sampler]) -> None:
    every = moves(Net(), sampler())
    frozen = Net()
    frozen.first.requires_grad_(False)
    for rest in (moves(frozen, sampler()), moves(Net(), sampler(), exclude=["first.*"]), moves(Net(), sampler(), include=["last.*"])):
        assert len(rest) < len(every)
        assert all(torch.equal(rest[name], every[name]) for name in rest)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_order_of_the_modules_changes_nothing(sampler: type[Sampler]) -> None:
    one, two = nn.Module(), nn.Module()
    for name in ("a", "b", "c"):
        one.add_module(name, nn.Linear(3, 4))
    for name in ("c", "a", "b"):
        two.add_module(name, nn.Linear(3, 4))
    first, second = moves(one, sampler()), moves(two, sampler())
    assert list(first) != list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_query_does_not_depend_on_its_neighbours(sampler: type[Sampler]) -> None:
    """Query 2 of 3 alone is query 2."""
    model = Net()
    space, other = DenseSpace(model), sampler()
    other.bind(space)
    three, alone = other.directions(11, 5, 3)[2], moves(Net(), sampler(), queries=3)
    for block in space.blocks:
        z = three.noise(block).draw(0, block.numel, torch.device("cpu"))
        assert torch.equal(alone[block.name].flatten(), z)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_changes_only_the_rounding(sampler: type[Sampler], dtype: torch.dtype) -> None:
    exact, rounded = moves(Net(), sampler()), moves(Net(dtype), sampler())
    for name, z in exact.items():
        unit = torch.finfo(dtype).eps * z.abs().clamp_min(1e-4)
        assert bool(((rounded[name] - z).abs() <= 2 * unit).all()), name


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_size_changes_nothing(sampler: type[Sampler], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe and update cut into odd pieces give the same bits."""

    def weights() -> list[bytes]:
        model = nn.Linear(37, 41).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        optimizer = ZOOptimizer(DenseSpace(model), sampler(), TwoPoint(2), lr=0.1, eps=0.1)
        x = torch.linspace(-1, 1, 74).view(2, 37).to(dtype)
        for _ in range(2):
            optimizer.step(lambda: model(x).float().square().mean())
        return [bits(p) for p in model.parameters()]

    whole = weights()
    for size in (64, 129, 1001):
        monkeypatch.setitem(noise._CHUNK, "cpu", size)
        assert weights() == whole


def test_threads_change_nothing() -> None:
    threads = torch.get_num_threads()
    one = moves(nn.Linear(300, 500), GaussianSampler())
    torch.set_num_threads(4)
    try:
        four = moves(nn.Linear(300, 500), GaussianSampler())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[name], four[name]) for name in one)

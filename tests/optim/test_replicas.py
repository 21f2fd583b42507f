"""Replicas in a plain loop: equal to one another, and to one process."""

from __future__ import annotations

import os
import re
import time
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nets import Net, bits, state_bits
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.blocks import Block
from zolightning.estimators import TwoPoint
from zolightning.noise import Key, Noise
from zolightning.objectives import Objective
from zolightning.objectives.base import BoundObjective
from zolightning.optim import ReplicaLostError, Replicas, ZOOptimizer
from zolightning.optim.checksum import checksum
from zolightning.samplers import GaussianSampler, Sampler
from zolightning.spaces import DenseSpace

MODES = ("rows", "directions")


class Weighted(Objective):
    """Cross-entropy of :class:`Net`, each row with a weight of its own."""

    def rows(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        out = model(batch["input_ids"])
        loss = F.cross_entropy(out if out.dtype == torch.float64 else out.float(), batch["label"], reduction="none")
        weight = batch["weight"].to(loss)
        return loss * weight, weight


def bound(model: nn.Module, step: int, rows: int = 5) -> BoundObjective:
    """The batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(rows, 5, generator=generator).to(next(model.parameters()).dtype)
    batch = {"input_ids": x, "label": torch.randint(0, 3, (rows,), generator=generator), "weight": torch.arange(1, rows + 1)}
    return Weighted().on(model, batch)


class Wave(Noise):
    """Noise that costs nothing to draw."""

    def draw(self, start: int, count: int, device: torch.device) -> Tensor:
        phase = self.key.block % 97 + 13.0 * self.key.step + 5.0 * self.key.query
        return torch.arange(start + phase, start + phase + count).mul(1.7).sin().mul(1.4)


class WaveSampler(Sampler):
    """Directions of :class:`Wave`."""

    def noise(self, block: Block, key: Key) -> Noise:
        return Wave(key)


def make(mode: str | None, queries: int = 1, dtype: torch.dtype = torch.float32, check_every: int = 50) -> tuple[Net, ZOOptimizer]:
    """A network and its optimizer; without a mode: of one process."""
    model = Net(dtype)
    model.eval()
    sampler = WaveSampler() if dtype != torch.bfloat16 else GaussianSampler()
    optimizer = ZOOptimizer(DenseSpace(model), sampler, TwoPoint(queries), lr=0.01, eps=0.1, seed=7)
    if mode is not None:
        optimizer.replicas = Replicas(mode, check_every)  # type: ignore[arg-type]
    return model, optimizer


def train(mode: str | None, queries: int, dtype: torch.dtype, steps: int = 200, rows: int = 5, state: Any = None) -> dict[str, Any]:
    """A run, or the rest of one."""
    model, optimizer = make(mode, queries, dtype)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    while optimizer.steps < steps:
        optimizer.step(bound(model, optimizer.steps, rows))
    assert optimizer.forwards == 2 * queries * steps, "they count for the whole run, whoever does them"
    payload = optimizer.replicas.payload if optimizer.replicas is not None else 0
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "bits": state_bits(model), "payload": payload}


@cache
def alone(queries: int, dtype: torch.dtype, steps: int = 200, rows: int = 5) -> dict[str, Any]:
    """The run of one process."""
    return train(None, queries, dtype, steps, rows)


@pytest.mark.parametrize(
    ("world", "queries", "dtype", "steps"),
    [(2, 3, torch.float32, 200), (3, 3, torch.float32, 200), (4, 5, torch.float32, 200), (2, 3, torch.bfloat16, 10)],
)
def test_directions(world: int, queries: int, dtype: torch.dtype, steps: int) -> None:
    """Also where some have more queries than others: the bits of one process."""
    runs = on_ranks(world, train, "directions", queries, dtype, steps)
    assert [run["bits"] == alone(queries, dtype, steps)["bits"] for run in runs] == [True] * world
    assert alone(queries, dtype, steps)["bits"] != state_bits(Net(dtype))


@pytest.mark.parametrize(("world", "rows"), [(2, 5), (3, 5), (4, 6)])
def test_rows(world: int, rows: int) -> None:
    """Also where some have more rows than others: equal to one another, and to one process up to the rounding of losses."""
    runs = on_ranks(world, train, "rows", 2, torch.float64, 200, rows)
    assert all(run["bits"] == runs[0]["bits"] for run in runs)
    one, start = alone(2, torch.float64, 200, rows)["model"], Net(torch.float64).state_dict()
    for name, weight in runs[0]["model"].items():
        torch.testing.assert_close(weight, one[name], rtol=0, atol=1e-11)
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 0.1


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 200), (torch.bfloat16, 20)])
def test_rows_in_few_bits(dtype: torch.dtype, steps: int) -> None:
    runs = on_ranks(3, train, "rows", 1, dtype, steps)
    assert runs[0]["bits"] == runs[1]["bits"] == runs[2]["bits"]


@pytest.mark.parametrize("mode", MODES)
def test_two_then_three(mode: str) -> None:
    """A run goes on with another number of processes."""
    half = on_ranks(2, train, mode, 3, torch.float64, 100)
    rest = on_ranks(3, train, mode, 3, torch.float64, 200, 5, half[0])
    assert rest[0]["bits"] == rest[1]["bits"] == rest[2]["bits"]
    whole = alone(3, torch.float64)
    if mode == "directions":
        assert rest[0]["bits"] == whole["bits"]
    for name, weight in rest[0]["model"].items():
        torch.testing.assert_close(weight, whole["model"][name], rtol=0, atol=1e-11)


def plain_loop(mode: str) -> tuple[dict[str, bytes], float]:
    """Ten steps of a closure that is only a function."""
    model, optimizer = make(mode, queries=2)
    for step in range(10):
        loss = optimizer.step(lambda step=step: bound(model, step)())  # type: ignore[misc]
    return state_bits(model), float(loss)


def test_a_plain_closure() -> None:
    """Its directions can be divided, its rows cannot."""
    model, optimizer = make(None, queries=2)
    for step in range(10):
        loss = optimizer.step(lambda step=step: bound(model, step)())  # type: ignore[misc]
    assert on_ranks(2, plain_loop, "directions") == [(state_bits(model), float(loss))] * 2
    for error in on_ranks(2, plain_loop, "rows"):
        assert str(error) == "replicas in mode=rows need an objective bound to a batch, this closure is none: use mode=directions"


def micro() -> list[bytes]:
    """Losses of a step with and without micro-batches."""
    losses = []
    for size in (None, 2):
        model, optimizer = make("rows", dtype=torch.float64)
        objective = bound(model, 0, rows=7)
        optimizer.step(BoundObjective(objective.objective, model, objective.batch, size))
        assert optimizer.losses is not None
        losses.append(optimizer.losses)
    torch.testing.assert_close(losses[0], losses[1])
    return [bits(loss) for loss in losses]


def test_micro_batches_of_a_part() -> None:
    first, second = on_ranks(2, micro)
    assert first == second


def test_what_crosses() -> None:
    """Losses and weights of the larger part of the rows; one loss a probe."""
    assert [run["payload"] for run in on_ranks(2, train, "rows", 2, torch.float64, 1)] == [2 * 4 * 3 * 8] * 2
    assert [run["payload"] for run in on_ranks(2, train, "directions", 3, torch.float32, 1)] == [4 * 4] * 2


def one_bad_row() -> tuple[int, bool]:
    """A step whose loss is not finite on the last process alone."""
    model, optimizer = make("rows")
    optimizer.step(bound(model, 0))
    before, bad = state_bits(model), bound(model, 1)
    bad.batch["input_ids"][4] = float("nan")  # row 4 belongs to the last
    optimizer.step(bad)
    return optimizer.skipped, state_bits(model) == before


def test_all_skip_what_one_cannot_compute() -> None:
    assert on_ranks(2, one_bad_row) == [(1, True)] * 2


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("rows", "3 replicas in mode=rows cannot divide 2 rows in a batch: use fewer devices or mode=directions"),
        ("directions", "3 replicas in mode=directions cannot divide 1 queries in a step: use fewer devices or mode=rows"),
    ],
)
def test_too_little_to_divide(mode: str, message: str) -> None:
    found = on_ranks(3, train, mode, 1, torch.float32, 1, 2)
    assert [(type(error), str(error)) for error in found] == [(ValueError, message)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "columns"}, "mode='columns' must be 'rows' or 'directions'"),
        ({"check_every": 0}, "check_every=0 must be at least 1"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Replicas(**options)


def planted(what: str) -> None:
    """Twelve steps; after the third, the second process has another weight or other batches. Says so at the tenth."""
    model, optimizer = make("directions", queries=2, check_every=5)
    for step in range(12):
        other = dist.get_rank() == 1 and step >= 6
        optimizer.step(bound(model, step + 50 * (other and what == "batches")))
        if other and what == "weights" and step == 6:
            weight = model.first.weight.detach().view(-1)
            weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))  # the last bit of one number


@pytest.mark.parametrize("what", ["weights", "batches"])
def test_a_disagreement_is_found(what: str) -> None:
    errors = [str(error) for error in on_ranks(2, planted, what)]
    assert errors[0] == errors[1]
    pattern = (
        rf"replicas disagree at step 10: the {what} of replica 0 have the checksum ([0-9a-f]{{16}}), those of replica 1 ([0-9a-f]{{16}})"
    )
    match = re.fullmatch(pattern, errors[0])
    assert match, errors[0]
    assert match[1] != match[2]


def different_from_the_start() -> None:
    """One step of two networks that differ."""
    model, optimizer = make("directions", queries=2)
    if dist.get_rank() == 1:
        model.first.weight.data[0, 0] += 1
    optimizer.step(bound(model, 0))


def test_the_first_step_is_compared() -> None:
    assert all("replicas disagree at step 1: the weights" in str(error) for error in on_ranks(2, different_from_the_start))


def dies(how: str) -> float:
    """The last process leaves, or falls asleep, at the third step."""
    model, optimizer = make("rows")
    for step in range(6):
        if step == 3 and dist.get_rank() == dist.get_world_size() - 1:
            if how == "dead":
                os._exit(9)
            time.sleep(5)
        before, start = state_bits(model), time.monotonic()
        try:
            optimizer.step(bound(model, step))
        except ReplicaLostError:
            assert time.monotonic() - start < 6
            assert state_bits(model) == before
            raise
    return 0.0


@pytest.mark.parametrize(("how", "what"), [("dead", "is gone"), ("silent", "does not answer in time")])
def test_the_others_stop(how: str, what: str) -> None:
    found = on_ranks(3, dies, how, timeout=2)
    message = f"another replica {what}; the run goes on from its last checkpoint, with any number of replicas"
    assert (type(found[0]), str(found[0])) == (ReplicaLostError, message)
    assert type(found[1]) is ReplicaLostError, "told by the first or by the last, which of the two is chance"
    assert found[2] == 9 if how == "dead" else isinstance(found[2], ReplicaLostError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (1,), ()])
def test_checksum(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Every change of one element shows, and so does the order."""
    tensor = torch.randint(0, 2, shape).to(dtype)
    found = {int(checksum([tensor]))}
    for index in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[index] = 1 - other.view(-1)[index].float()
        found.add(int(checksum([other])))
    assert len(found) == 1 + tensor.numel()
    assert int(checksum([tensor.clone()])) in found


def test_checksum_of_several() -> None:
    a, b = torch.arange(6.0), torch.arange(7.0)
    assert checksum([a, b]) != checksum([b, a])
    assert checksum([a[1:3]]) == checksum([a[1:3].clone()]), "wherever it lies in memory"
    assert checksum([]) == 0
    long = torch.zeros((1 << 22) + 3, dtype=torch.int64)
    swapped = long.clone()
    long[0], swapped[-1] = 1, 1
    assert checksum([long]) != checksum([swapped])

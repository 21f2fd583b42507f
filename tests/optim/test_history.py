"""The ring of the latest steps, and steps that are taken from a record."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nets import Net, net_closure, state_bits

from zolightning.estimators import TwoPoint
from zolightning.optim import SGD, ZOOptimizer
from zolightning.optim.history import SIZE, History, Row
from zolightning.policies import FeaturePolicy, PertNN
from zolightning.samplers import GaussianSampler, PolicySampler, RademacherSampler, Sampler
from zolightning.spaces import DenseSpace
from zolightning.testing import DeviceOnly

SAMPLERS: dict[str, Any] = {
    "gaussian": GaussianSampler,
    "rademacher": RademacherSampler,
    "paper": lambda: PolicySampler(PertNN(), refresh_every=3),
    "policy": lambda: PolicySampler(FeaturePolicy(hidden=4), RademacherSampler()),
}


def make(sampler: Sampler, dtype: torch.dtype = torch.float32, queries: int = 2, **options: Any) -> ZOOptimizer:
    options = {"lr": 0.02, "eps": 0.1, "seed": 3, "rule": SGD(weight_decay=0.01), **options}
    return ZOOptimizer(DenseSpace(Net(dtype).eval()), sampler, TwoPoint(queries), **options)


def run(optimizer: ZOOptimizer, first: int, last: int) -> list[tuple[Any, ...]]:
    """Steps with a changing rate, number 3 not finite; what the host sees of each."""
    seen = []
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        scales = optimizer.sampler.scales().clone()
        closure = net_closure(optimizer.space.model, step)
        optimizer.step(lambda closure=closure, step=step: closure() * (math.nan if step == 3 else 1.0))
        assert optimizer.losses is not None
        assert optimizer.coefficients is not None
        seen.append((step, optimizer.losses.tolist(), optimizer.coefficients.tolist(), scales))
    return seen


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_what_the_steps_did(dtype: torch.dtype, kind: str) -> None:
    optimizer = make(SAMPLERS[kind](), dtype)
    seen = run(optimizer, 0, 7)
    rows = optimizer.history.drain(optimizer.steps)
    assert [row.step for row in rows] == list(range(7))
    assert [row.valid for row in rows] == [step != 3 for step in range(7)]
    wide = dtype == torch.float64
    for row, (step, losses, coefficients, scales) in zip(rows, seen, strict=True):
        assert row.lr == (0.02 / (1 + step) if wide else float(torch.tensor(0.02 / (1 + step), dtype=torch.float32)))
        if row.valid:
            assert (list(row.losses), list(row.coefficients)) == (losses, coefficients)
        if kind in ("gaussian", "rademacher"):  # a policy's scales follow from what refresh() measures in the step itself
            assert torch.equal(row.scales, scales)
    assert optimizer.history.drain(optimizer.steps) == [], "rows are handed out once"


def test_changing_scales_are_those_of_each_step() -> None:
    optimizer = make(SAMPLERS["paper"]())
    run(optimizer, 0, 6)
    rows = optimizer.history.drain(6)
    assert len({row.scales.numpy().tobytes() for row in rows}) > 2
    assert not SAMPLERS["paper"]().constant_scales
    assert GaussianSampler().constant_scales


def small(constant: bool = True, size: int = 4) -> History:
    return History(1, 2, torch.ones(3), constant, torch.float32, size)


def write(history: History, step: int) -> None:
    figures = torch.tensor([float(step)])
    args = (torch.tensor(step), torch.tensor(0.5), figures, figures.expand(2), torch.tensor(True), torch.full((3,), float(step)))
    history.write(*args)


@pytest.mark.parametrize("constant", [True, False])
def test_overflow_goes_to_the_sink(constant: bool) -> None:
    history, got = small(constant), []
    history.sink = got.extend
    for step in range(11):
        history.make_room(step)
        write(history, step)
    history.drain(11)
    assert [row.step for row in got] == list(range(11))
    assert [row.coefficients for row in got] == [(float(step),) for step in range(11)]
    assert [float(row.scales[0]) for row in got] == [1.0 if constant else float(step) for step in range(11)]


def test_without_a_sink_the_oldest_are_lost() -> None:
    history = small()
    for step in range(11):
        history.make_room(step)
        write(history, step)
    assert [row.step for row in history.drain(11)] == [7, 8, 9, 10]


def test_a_step_that_was_not_counted_is_noticed() -> None:
    history = small()
    write(history, 0)
    write(history, 5)
    with pytest.raises(RuntimeError, match="the record of step 1 holds step 5"):
        history.drain(2)


def test_writing_is_device_operations_alone() -> None:
    history = small(constant=False)
    with DeviceOnly():
        write_on_device(history)


def write_on_device(history: History) -> None:
    one = torch.ones(())
    history.write(torch.ones((), dtype=torch.int64), one, one.view(1), one.expand(2), one.bool(), one.expand(3))


def test_a_long_run_without_a_sink() -> None:
    """More steps than the ring holds."""
    optimizer = ZOOptimizer(DenseSpace(torch.nn.Linear(2, 1)), lr=1e-3)
    for _ in range(SIZE + 5):
        optimizer.step(lambda: optimizer.space.model(torch.ones(1, 2)).square().mean())
    rows = optimizer.history.drain(optimizer.steps)
    assert (rows[0].step, len(rows)) == (5, SIZE)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_recorded_steps_repeat(dtype: torch.dtype, kind: str) -> None:
    """Weights, counts, the sampler's state and what follows: as if the losses had been evaluated."""
    whole = make(SAMPLERS[kind](), dtype)
    run(whole, 0, 6)
    rows = whole.history.drain(6)
    again = make(SAMPLERS[kind](), dtype)
    again.repeat(rows)
    for _ in rows:
        assert again.repeating
        loss = again.step(lambda: 1 / 0)
    assert not again.repeating
    assert loss.item() == pytest.approx(sum(rows[-1].losses) / 4)
    assert again.history.drain(6) == []
    assert state_bits(again.space.model) == state_bits(whole.space.model) != state_bits(Net(dtype))
    one, two = whole.state_dict(), again.state_dict()
    assert torch.equal(one["state"]["skipped"], two["state"]["skipped"])
    for name, tensor in one["state"]["sampler"].items():
        assert torch.equal(tensor, two["state"]["sampler"][name]), name
    run(whole, 6, 9)
    run(again, 6, 9)
    assert state_bits(again.space.model) == state_bits(whole.space.model)
    assert (again.steps, again.forwards, again.skipped) == (whole.steps, whole.forwards, whole.skipped) == (9, 36, 1)
    assert [row[:3] for row in again.history.drain(9)] == [row[:3] for row in whole.history.drain(9)]


def test_other_steps_are_refused() -> None:
    optimizer = make(GaussianSampler())
    row = Row(1, True, 0.1, (1.0, 1.0), (1.0,) * 4, torch.ones(7))
    with pytest.raises(ValueError, match="the recorded steps do not go on from step 0"):
        optimizer.repeat([row])


def test_a_loaded_state_has_no_rows() -> None:
    optimizer = make(GaussianSampler())
    run(optimizer, 0, 3)
    other = make(GaussianSampler())
    other.load_state_dict(optimizer.state_dict())
    assert other.history.drain(other.steps) == []
    run(other, 4, 5)
    assert [row.step for row in other.history.drain(other.steps)] == [3]

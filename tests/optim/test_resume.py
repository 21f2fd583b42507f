"""Saving and loading: bit-equal continuation; schedulers; states of other models."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from nets import Net, net_closure, state_bits
from torch import nn

from zolightning.estimators import TwoPoint
from zolightning.optim import SGD, ZOOptimizer
from zolightning.samplers import GaussianSampler, RademacherSampler, Sampler
from zolightning.spaces import DenseSpace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fresh(dtype: torch.dtype, sampler: Sampler, **options: Any) -> tuple[nn.Module, ZOOptimizer, torch.optim.lr_scheduler.LambdaLR]:
    """A network, its optimizer and a schedule."""
    model = Net(dtype).eval()
    options = {"lr": 0.02, "eps": 0.1, "seed": (1 << 63) + 5, **options}
    optimizer = ZOOptimizer(DenseSpace(model), sampler, TwoPoint(2), rule=SGD(weight_decay=0.01), **options)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def run(model: nn.Module, optimizer: ZOOptimizer, schedule: torch.optim.lr_scheduler.LambdaLR, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` with their batches; step 3 is not finite."""
    for step in range(first, last):
        optimizer.step(lambda step=step: net_closure(model, step)() * (float("nan") if step == 3 else 1.0))  # type: ignore[misc]
        schedule.step()


def run_bad(optimizer: ZOOptimizer, steps: int) -> None:
    """Steps whose loss is not a number."""
    for _ in range(steps):
        optimizer.step(lambda: torch.tensor(float("nan")))


def through_a_file(state: Any) -> Any:
    """Save and load."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("sampler", [GaussianSampler, RademacherSampler])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_steps_are_five_and_five(dtype: torch.dtype, sampler: type[Sampler]) -> None:
    """A fresh model and optimizer, with other arguments, continue to the same bits and counts."""
    whole = fresh(dtype, sampler())
    run(*whole, 0, 10)
    half = fresh(dtype, sampler())
    run(*half, 0, 5)
    saved = through_a_file([part.state_dict() for part in half])
    rest = fresh(dtype, sampler(), lr=0.5, seed=1)
    for part, state in zip(rest, saved, strict=True):
        part.load_state_dict(state)
    run(*rest, 5, 10)
    assert state_bits(rest[0]) == state_bits(whole[0])
    assert (rest[1].steps, rest[1].forwards, rest[1].skipped) == (whole[1].steps, whole[1].forwards, whole[1].skipped) == (10, 40, 1)
    assert rest[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]


def test_a_run_is_a_function_of_its_seed() -> None:
    bits = []
    for seed in (3, 3, 4):
        parts = fresh(torch.bfloat16, GaussianSampler(), seed=seed)
        run(*parts, 0, 3)
        bits.append(state_bits(parts[0]))
    assert bits[0] == bits[1] != bits[2]


def test_skipped_steps_in_a_row_survive() -> None:
    """A stop after many bad steps counts those before the checkpoint too."""
    model, optimizer, _ = fresh(torch.float32, GaussianSampler(), max_skipped=4)
    optimizer.step(net_closure(model))
    run_bad(optimizer, 2)
    again, other, _ = fresh(torch.float32, GaussianSampler(), max_skipped=4)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    other.setup_report = optimizer.setup_report
    with pytest.raises(RuntimeError, match="7 steps in a row"):
        run_bad(other, 5)
    assert state_bits(again) == state_bits(Net()), "no bad step moved the fresh model"


def test_state_of_another_model() -> None:
    small = ZOOptimizer(DenseSpace(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="the optimizer state is of 2 blocks, this space has 7: a checkpoint of another model"):
        ZOOptimizer(DenseSpace(Net())).load_state_dict(small.state_dict())


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=4),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10, cycle_momentum=False),
    ],
    ids=["cosine", "linear", "one-cycle"],
)
def test_torch_schedulers(schedule: Any) -> None:
    """The schedule's rate is the one that the step uses."""
    model = Net(torch.float64).eval()
    optimizer = ZOOptimizer(DenseSpace(model), lr=0.1, eps=1e-3)
    scheduler = schedule(optimizer)
    sizes = []
    for _ in range(4):
        start = [p.detach().clone() for p in model.parameters()]
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step(net_closure(model))
        scheduler.step()
        assert optimizer.coefficients is not None
        direction = optimizer.sampler.directions(0, optimizer.steps - 1, 1)[0]
        for block, old in zip(optimizer.space.blocks, start, strict=True):
            z = direction.noise(block).draw(0, block.numel, torch.device("cpu")).double().view_as(old)
            assert torch.allclose(block.tensor, old - rate * optimizer.coefficients[0] * z, atol=1e-13)
        sizes.append(rate)
    assert len(set(sizes)) == 4

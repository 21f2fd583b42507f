"""Stochastic rounding: right on average, and exact where nothing has to be rounded."""

from __future__ import annotations

import math

import pytest
import torch
from nets import bits
from torch import Tensor

from zolightning import kernels
from zolightning.noise import GaussianNoise, Key, Noise, rounding_bits

DRAWS = 1 << 20
CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16)


def spacing(value: float, dtype: torch.dtype) -> float:
    """Distance between the two neighbours of a value."""
    info = torch.finfo(dtype)
    return info.eps * max(2.0 ** math.floor(math.log2(abs(value))), info.smallest_normal)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((dtype, value) for dtype in DTYPES for value in (1.2345, 3.0e-3, 1.0 + 2.0**-20, 0.99999, 317.77)),
        (torch.float16, 65000.3),
        (torch.float16, 6.05e-5),
        (torch.float16, 3.3e-6),
        (torch.float16, 2.0e-8),
        (torch.bfloat16, 1.0e-38),
        (torch.bfloat16, 3.0e-39),
    ],
)
def test_mean_is_the_value(dtype: torch.dtype, value: float, sign: float) -> None:
    """Over a million draws the mean is the value to 4 standard errors, and only the two neighbours appear."""
    exact = torch.tensor(sign * value)
    rounded = kernels.stochastic_round(exact.repeat(DRAWS), rounding_bits(Key(1, 2, 3), 0, DRAWS, CPU), dtype).double()
    unit = spacing(value, dtype)
    share = (abs(float(exact)) / unit) % 1.0
    error = unit * math.sqrt(max(share * (1 - share), 1 / DRAWS) / DRAWS)
    assert abs(float(rounded.mean() - exact.double())) < 4 * error + unit * 2.0**-16 * (dtype == torch.float16)
    assert float((rounded - exact.double()).abs().max()) < unit
    assert rounded.unique().numel() <= 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("random", [0, 1, 0x1FFF, 0x8000, 0xFFFF])
def test_representable_values_never_move(dtype: torch.dtype, random: int) -> None:
    """All 65,536 values of the type, signed zeros, subnormals and infinities included, whatever the random bits."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    out = kernels.stochastic_round(every.float(), torch.full(every.shape, random), dtype)
    assert bits(out) == bits(every)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_one(dtype: torch.dtype) -> None:
    out = kernels.stochastic_round(torch.tensor([float("nan")] * 3), torch.tensor([0, 0x1FFF, 0xFFFF]), dtype)
    assert bool(out.isnan().all())


class _Ones(Noise):
    """A direction of ones: every element should move by the same amount."""

    def draw(self, start: int, count: int, device: torch.device) -> Tensor:
        return torch.ones(count, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_updates_arrive(dtype: torch.dtype) -> None:
    """A step far below one unit in the last place moves the mean of the weights by itself; plain rounding would lose it."""
    step = 1e-6
    weight = torch.ones(DRAWS, dtype=dtype)
    key = Key(5, 6, 7)
    kernels.update(weight, torch.tensor([step]), [_Ones(key)], 0.0, torch.tensor(True))
    unit = torch.finfo(dtype).eps
    step_seen = float(torch.tensor(1.0 + step).double() - 1.0)  # what float32 keeps of it
    assert abs(float(weight.double().mean()) - 1.0 - step_seen) < 4 * math.sqrt(step * unit / DRAWS)
    assert float(weight.double().mean()) > 1.0


def test_zero_amount_never_moves_weights() -> None:
    """A zero coefficient leaves 16-bit weights where they are: rounding adds no noise of its own."""
    weight = torch.randn(4097).half()
    moved, key = weight.clone(), Key(1, 1, 1)
    kernels.update(moved, torch.zeros(1), [GaussianNoise(key)], 0.0, torch.tensor(True))
    assert torch.equal(moved, weight)

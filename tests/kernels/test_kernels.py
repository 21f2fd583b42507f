"""Triton under its interpreter (or on the GPU) has the bits of plain torch; plain torch has the bits of the description."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from nets import bits
from torch import Tensor

from zolightning import kernels
from zolightning.kernels import plain
from zolightning.noise import GaussianNoise, Key, Noise, RademacherNoise, block_id

KINDS: tuple[type[Noise], ...] = (GaussianNoise, RademacherNoise)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEYS = [Key(0, 5, 0), Key((1 << 64) - 1, (1 << 32) - 1, (1 << 32) - 1), Key(1 << 63, block_id("b.weight"), 12)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weights(numel: int, dtype: torch.dtype) -> Tensor:
    """Random weights that start with the awkward values of the type."""
    w = torch.randn(numel).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal
    awkward = [-0.0, 0.0, tiny / 4, -tiny / 8, tiny, 65000.0, -65000.0, 1.0]
    w[: len(awkward)] = torch.tensor(awkward, dtype=torch.float64)[:numel].to(dtype)
    return w


def fused_materialise(weight: Tensor, amount: Tensor, noise: Noise) -> Tensor:
    """Triton's form for one tensor."""
    fused = pytest.importorskip("zolightning.kernels.fused", reason="needs triton")
    table = fused.Table([weight], [noise.key.block], [0], [0])
    return fused.materialise(table, amount.reshape(1), noise, clock(noise, weight), 1)[0][0]


def fused_update(weight: Tensor, amounts: Tensor, noises: list[Noise], shrink: float, valid: Tensor) -> None:
    """Triton's form for one tensor."""
    fused = pytest.importorskip("zolightning.kernels.fused", reason="needs triton")
    table, rate = fused.Table([weight], [noises[0].key.block], [0], [0]), torch.tensor(shrink, device=weight.device)
    fused.update(table, amounts[:, None].contiguous(), noises, rate, valid, clock(noises[0], weight))


def clock(noise: Noise, weight: Tensor) -> Tensor:
    """The step as the kernels read it."""
    return torch.tensor(noise.key.step, device=weight.device)


def queries(kind: type[Noise], key: Key, count: int) -> list[Noise]:
    """Noises of consecutive queries."""
    return [kind(Key(key.seed, key.block, key.step, key.query + q)) for q in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 1023, 2053])
def test_materialise_has_the_same_bits(kind: type[Noise], dtype: torch.dtype, numel: int) -> None:
    w = weights(numel, dtype)
    for key in KEYS:
        for amount in (1e-3, -0.37):
            noise, factor = kind(key), torch.tensor(amount)
            out = fused_materialise(w.to(DEVICE), factor.to(DEVICE), noise)
            assert out.dtype == dtype
            assert bits(out) == bits(plain.materialise(w, factor, noise)[0])


def test_materialise_of_a_transposed_weight() -> None:
    """Elements are counted in the tensor's logical order, whatever its strides."""
    w, noise, amount = torch.randn(17, 9).t(), GaussianNoise(KEYS[0]), torch.tensor(0.1)
    expected = kernels.materialise(w.contiguous(), amount, noise)
    assert expected.shape == w.shape
    for device in ("cpu", DEVICE):
        out = kernels.materialise(w.to(device), amount.to(device), noise)
        assert out.is_contiguous()
        assert bits(out) == bits(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("numel", "count", "shrink"), [(1, 1, 0.0), (1023, 3, 0.0), (2053, 1, 0.1), (1027, 2, 1e-9)])
def test_update_has_the_same_bits(kind: type[Noise], dtype: torch.dtype, numel: int, count: int, shrink: float) -> None:
    for key in KEYS[1:]:
        for scale in (1e-5, 0.3):
            one = weights(numel, dtype)
            two, amounts, noises = one.clone().to(DEVICE), torch.randn(count) * scale, queries(kind, key, count)
            plain.update(one, amounts, noises, torch.tensor(shrink), torch.tensor(True))
            fused_update(two, amounts.to(DEVICE), noises, shrink, torch.tensor(True, device=DEVICE))
            assert bits(one) == bits(two)


def test_update_reads_strided_amounts_and_any_first_query() -> None:
    """The amounts are a column of ``[queries, blocks]``, and queries need not begin at 0."""
    key = Key(3, 5, 1, query=6)
    one, amounts, noises = torch.randn(130).bfloat16(), torch.randn(3, 4)[:, 2], queries(GaussianNoise, key, 3)
    two = one.clone().to(DEVICE)
    plain.update(one, amounts, noises, torch.tensor(0.0), torch.tensor(True))
    fused_update(two, amounts.to(DEVICE), noises, 0.0, torch.tensor(True, device=DEVICE))
    assert bits(one) == bits(two)


@pytest.mark.parametrize("dtype", DTYPES)
def test_invalid_step_leaves_the_bits(dtype: torch.dtype) -> None:
    """Also where the amounts are not finite."""
    w, amounts, noises = weights(515, dtype), torch.tensor([float("nan"), 1.0]), queries(GaussianNoise, KEYS[1], 2)
    for update, device in ((kernels.update, "cpu"), (fused_update, DEVICE)):
        moved = w.clone().to(device)
        update(moved, amounts.to(device), noises, 0.5, torch.tensor(False, device=device))
        assert bits(moved) == bits(w)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_passes_follow_the_description(kind: type[Noise]) -> None:
    """``W + a z`` and ``d W + sum a_q z_q`` in float32, from noise drawn in numpy."""
    name, count = "b.weight", 777
    draw = reference.gaussian if kind is GaussianNoise else reference.rademacher
    key = Key(11, block_id(name), 4)
    w = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    z0, z1 = draw(11, name, 4, 0, count), draw(11, name, 4, 1, count)
    out = kernels.materialise(torch.from_numpy(w), torch.tensor(0.25), kind(key))
    assert np.array_equal(out.numpy(), w + z0 * np.float32(0.25))
    moved = torch.from_numpy(w.copy())
    kernels.update(moved, torch.tensor([0.5, -2.0]), queries(kind, key, 2), 0.25, torch.tensor(True))
    assert np.array_equal(moved.numpy(), w + ((z0 * np.float32(0.5) + z1 * np.float32(-2)) - w * np.float32(0.25)))


def test_small_weight_decay_arrives() -> None:
    """A rate of 1e-8, far below what ``1 - rate`` can say in float32, shrinks the weights on average."""
    numel, key = 1 << 20, KEYS[0]
    moved = []
    for amount in (1e-3, -1e-3):  # opposite steps: their mean is the decay alone
        w = torch.ones(numel)
        kernels.update(w, torch.tensor([amount]), [GaussianNoise(key)], 1e-8, torch.tensor(True))
        moved.append(w.double())
    shift, noise = float((moved[0] + moved[1] - 2).mean() / 2), 6e-8 / (2 * numel) ** 0.5
    assert abs(shift + 1e-8) < 4 * noise


def test_chunks_change_nothing() -> None:
    """A tensor larger than a chunk is moved as if there were none."""
    numel, key = (1 << 16) + 333, KEYS[2]
    w = torch.randn(numel).bfloat16()
    out = kernels.materialise(w, torch.tensor(0.01), GaussianNoise(key))
    z = GaussianNoise(key).draw(0, numel, torch.device("cpu"))
    assert torch.equal(out, (w.float() + z * 0.01).bfloat16())
    moved = w.clone()
    kernels.update(moved, torch.tensor([1e-3]), [GaussianNoise(key)], 0.0, torch.tensor(True))
    tail = kernels.stochastic_round(
        (w.float() + z * 1e-3)[-300:],
        torch.from_numpy(reference.rounding(key.seed, "b.weight", key.step, 0, numel))[-300:],
        torch.bfloat16,
    )
    assert torch.equal(moved[-300:], tail)


def test_float64_weights_keep_their_precision() -> None:
    w, noise = torch.randn(9, dtype=torch.float64), GaussianNoise(KEYS[0])
    out = kernels.materialise(w, torch.tensor(1e-12, dtype=torch.float64), noise)
    z = noise.draw(0, 9, torch.device("cpu")).double()
    assert out.dtype == torch.float64
    assert torch.equal(out, w + z * 1e-12)

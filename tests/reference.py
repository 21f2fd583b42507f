"""The noise contract and the step once more, written from their descriptions alone (numpy; nothing of zolightning)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

F32 = np.float32
U32 = np.uint64(0xFFFFFFFF)
LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1)
LOG += (2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)


def philox(seed: int, c0: np.ndarray, c1: int, c2: int, c3: int) -> list[np.ndarray]:
    """Philox 4x32-10 in unsigned 64-bit arithmetic: four arrays of 32-bit words."""
    x = [np.asarray(c0, dtype=np.uint64)] + [np.full(len(c0), word, dtype=np.uint64) for word in (c1, c2, c3)]
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(b >> np.uint64(32)) ^ x[1] ^ np.uint64(k0), b & U32, (a >> np.uint64(32)) ^ x[3] ^ np.uint64(k1), a & U32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x


def block_number(name: str) -> int:
    """32-bit id of a block."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def log32(u: np.ndarray) -> np.ndarray:
    """Cephes' single-precision logarithm, every operation rounded to float32."""
    mantissa, exponent = np.frexp(u)
    low = mantissa < F32(np.sqrt(0.5))
    f = np.where(low, mantissa * F32(2), mantissa) - F32(1)
    e = (exponent - low).astype(F32)
    z = f * f
    y = np.full_like(f, F32(LOG[0]))
    for coefficient in LOG[1:]:
        y = y * f + F32(coefficient)
    y = y * f * z + e * F32(-2.12194440e-4) - z * F32(0.5)
    return (f + y) + e * F32(0.693359375)


def normal_pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box-Muller in float32."""
    radius = np.sqrt(log32((a.astype(F32) + F32(0.5)) * F32(2.0**-32)) * F32(-2))
    quadrant = (b.astype(np.int64) + 2**29) // 2**30
    f = (b.astype(np.int64) - quadrant * 2**30).astype(F32) * F32(1.4629180792671596e-9)
    z = f * f
    s = ((z * F32(-1.9515295891e-4) + F32(8.3321608736e-3)) * z + F32(-1.6666654611e-1)) * z * f + f
    c = ((z * F32(2.443315711809948e-5) + F32(-1.388731625493765e-3)) * z + F32(4.166664568298827e-2)) * z * z - z * F32(0.5) + F32(1)
    turn = quadrant % 4
    return radius * np.choose(turn, [c, -s, -c, s]), radius * np.choose(turn, [s, c, -s, -c])


def gaussian(seed: int, name: str, step: int, query: int, count: int) -> np.ndarray:
    """Standard normals of a block, float32."""
    w = philox(seed, np.arange(-(-count // 4)), block_number(name), step, query * 16)
    return np.stack([*normal_pair(w[0], w[1]), *normal_pair(w[2], w[3])], axis=1).reshape(-1)[:count]


def rademacher(seed: int, name: str, step: int, query: int, count: int) -> np.ndarray:
    """Random signs of a block, float32."""
    w = np.stack(philox(seed, np.arange(-(-count // 128)), block_number(name), step, query * 16), axis=1)
    e = np.arange(count)
    bits = (w[e // 128, e % 128 // 32] >> (e % 32).astype(np.uint64)) & np.uint64(1)
    return np.where(bits == 1, F32(1), F32(-1))


def rounding(seed: int, name: str, step: int, query: int, count: int) -> np.ndarray:
    """16-bit rounding numbers of a block."""
    w = np.stack(philox(seed, np.arange(-(-count // 8)), block_number(name), step, query * 16 + 1), axis=1)
    e = np.arange(count)
    return ((w[e // 8, e % 8 // 2] >> (e % 2 * 16).astype(np.uint64)) & np.uint64(0xFFFF)).astype(np.int64)


Draw = Callable[[int, str, int, int, int], np.ndarray]


def plain_step(
    weights: Mapping[str, Tensor],
    loss: Callable[[dict[str, Tensor]], Tensor],
    draw: Draw,
    *,
    seed: int,
    step: int,
    queries: int,
    lr: float,
    eps: float,
    weight_decay: float,
) -> dict[str, Tensor]:
    """One step of multi-query SPSA with decoupled weight decay, as a text book has it (float64)."""
    estimate = {name: torch.zeros_like(w) for name, w in weights.items()}
    for query in range(queries):
        u = {name: torch.from_numpy(draw(seed, name, step, query, w.numel())).double().view_as(w) for name, w in weights.items()}
        plus = loss({name: w + eps * u[name] for name, w in weights.items()})
        minus = loss({name: w - eps * u[name] for name, w in weights.items()})
        for name in weights:
            estimate[name] += (plus - minus) / (2 * eps) * u[name] / queries
    return {name: w - lr * weight_decay * w - lr * estimate[name] for name, w in weights.items()}

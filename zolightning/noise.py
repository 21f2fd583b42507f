"""Random numbers as a pure function of ``(seed, block, step, query, purpose, element)``.

One contract, fixed once and for all, so that a run can be replayed anywhere:

* generator: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011);
* key: the 64-bit seed; counter: ``(element group, block id, step, query * 16 + purpose)``;
* an element is a flat index into the whole (unsharded) tensor;
* Rademacher: bit ``e % 128`` of counter ``e // 128``, 1 meaning +1 and 0 meaning -1;
* Gaussian: lane ``e % 4`` of counter ``e // 4``; lanes (0, 1) and (2, 3) are the cosine and sine of one Box-Muller pair;
* rounding bits: 16-bit half ``e % 8`` (low half first) of counter ``e // 8``.

Logarithm and sine are polynomials that use IEEE ``+``, ``*`` and ``sqrt`` alone and never a fused multiply-add, so a CPU and a
GPU give the same bits. :mod:`zolightning.kernels.noise` holds the same functions for Triton. Nothing here touches a global
random state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_MASK = 0xFFFFFFFF

# log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], and sine and cosine on [-pi/4, pi/4] (Cephes, single precision).
LOG: tuple[float, ...] = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1)
LOG += (-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SQRT_HALF_BITS = 0x3F3504F3
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
TO_ANGLE = 1.4629180792671596e-9  # 2 pi / 2**32
TO_UNIT = 2.0**-32

# On a CPU a chunk must stay below PyTorch's threading grain: many small parallel regions are 30 times slower than none.
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}


class Purpose(IntEnum):
    """What a stream is for; at most 16 values, and never renumbered."""

    DIRECTION = 0
    ROUNDING = 1
    BASIS = 2


@dataclass(frozen=True)
class Key:
    """Names one stream of random numbers.

    Args:
        seed: Run seed, 0 to 2**64 - 1.
        block: 32-bit block id, see :func:`block_id`.
        step: Optimizer step, 0 to 2**32 - 1.
        query: Direction within the step, 0 to 2**28 - 1.
    """

    seed: int
    block: int
    step: int
    query: int = 0


def block_id(name: str) -> int:
    """32-bit id of a block: the first four bytes of BLAKE2s of its canonical name.

    Example:
        >>> block_id("model.embed_tokens.weight")
        3009005979
    """
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def philox(seed: int, counter: tuple[Tensor, int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10.

    Args:
        seed: 64-bit key.
        counter: Four 32-bit words; the first an int64 tensor of any shape, the others plain integers.

    Returns:
        Four int64 tensors of that shape, with values in [0, 2**32).
    """
    k0, k1 = seed & _MASK, seed >> 32
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # int64 products wrap; the mask takes the sign extension away again.
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK  # type: ignore[assignment]
        k0, k1 = (k0 + PHILOX_W[0]) & _MASK, (k1 + PHILOX_W[1]) & _MASK
    return c0, c1, c2, c3  # type: ignore[return-value]


def _words(key: Key, purpose: Purpose, first: int, last: int, device: torch.device) -> tuple[Tensor, ...]:
    groups = torch.arange(first, last, dtype=torch.int64, device=device)
    return philox(key.seed, (groups, key.block, key.step, key.query * 16 + int(purpose)))


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32 numbers, to about 1 ulp."""
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    z = f * f
    y = f * LOG[0] + LOG[1]
    for coefficient in LOG[2:]:
        y = y * f + coefficient
    y = y * f * z
    y = y + e * LN2_LOW
    y = y - z * 0.5
    return (f + y) + e * LN2_HIGH


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``2 pi word / 2**32``; ``word`` int64 in [0, 2**32)."""
    quadrant = (word + (1 << 29)) >> 30
    f = (word - (quadrant << 30)).to(torch.float32) * TO_ANGLE
    z = f * f
    s = ((z * SIN[0] + SIN[1]) * z + SIN[2]) * z * f + f
    c = ((z * COS[0] + COS[1]) * z + COS[2]) * z * z - z * 0.5 + 1.0
    odd = (quadrant & 1).bool()
    cos, sin = torch.where(odd, s, c), torch.where(odd, c, s)
    cos = torch.where(((quadrant + 1) & 2).bool(), -cos, cos)
    return cos, torch.where((quadrant & 2).bool(), -sin, sin)


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals (float32) from two 32-bit words (int64 tensors)."""
    squared = _log((a.to(torch.float32) + 0.5) * TO_UNIT) * -2.0
    # PyTorch's float32 square root is not correctly rounded on every CPU; through float64 it is.
    radius = squared.to(torch.float64).sqrt().to(torch.float32)
    cos, sin = _cos_sin(b)
    return radius * cos, radius * sin


@dataclass(frozen=True)
class Noise:
    """The noise ``z`` of one block in one query; a pure function of its key.

    Subclass it, with a :meth:`draw` of your own, to give a sampler another distribution.

    Args:
        key: Which stream.
        purpose: What it is drawn for; streams of two purposes are independent.
    """

    key: Key
    purpose: Purpose = field(default=Purpose.DIRECTION, kw_only=True)
    #: Name under which the fused kernels know this distribution; empty: only :meth:`draw` does.
    fused: ClassVar[str] = ""

    def draw(self, start: int, count: int, device: torch.device) -> Tensor:
        """Elements ``start`` to ``start + count`` of the flat tensor.

        Returns:
            float32, shape ``[count]``, on ``device``. Must not depend on how the tensor is cut into chunks.
        """
        raise NotImplementedError

    def chunks(self, numel: int, device: torch.device, first: int = 0) -> Iterator[tuple[int, int, Tensor]]:
        """Walk over ``numel`` elements from the block's element ``first`` on: ``(start, stop, noise)``, counted from there."""
        step = _CHUNK.get(device.type, _CHUNK["cpu"])
        for start in range(0, numel, step):
            stop = min(start + step, numel)
            yield start, stop, self.draw(first + start, stop - start, device)


class GaussianNoise(Noise):
    """Standard normal numbers."""

    fused: ClassVar[str] = "gaussian"

    def draw(self, start: int, count: int, device: torch.device) -> Tensor:
        first = start // 4
        w0, w1, w2, w3 = _words(self.key, self.purpose, first, (start + count + 3) // 4, device)
        lanes = torch.stack([*box_muller(w0, w1), *box_muller(w2, w3)], dim=-1).flatten()
        return lanes[start - first * 4 :][:count]


class RademacherNoise(Noise):
    """+1 or -1 with equal probability."""

    fused: ClassVar[str] = "rademacher"

    def draw(self, start: int, count: int, device: torch.device) -> Tensor:
        first = start // 128
        words = torch.stack(_words(self.key, self.purpose, first, (start + count + 127) // 128, device), dim=-1)
        bits = (words.to(torch.int32).unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=device)) & 1
        return (bits.flatten()[start - first * 128 :][:count] * 2 - 1).to(torch.float32)


@dataclass(frozen=True)
class LowRankNoise(Noise):
    r"""A matrix :math:`z = B A / \sqrt{r}`: ``B`` (``[N, r]``) is new in every direction, ``A`` (``[r, H]``) in every window of steps.

    Both are Gaussian. ``A`` is rounded to the weights' type, in which models compute with it.

    Args:
        key: Key of the direction.
        columns: ``H``.
        rank: ``r``.
        window: Steps that share an ``A``.
        dtype: Type of the weights.
    """

    columns: int = 1
    rank: int = 1
    window: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def left(self) -> GaussianNoise:
        """Noise of ``B``."""
        return GaussianNoise(self.key)

    @property
    def basis(self) -> GaussianNoise:
        """Noise of ``A``."""
        return GaussianNoise(replace(self.key, step=self.key.step // self.window, query=0), purpose=Purpose.BASIS)

    def draw(self, start: int, count: int, device: torch.device) -> Tensor:
        first, last = start // self.columns, -(-(start + count) // self.columns)
        left = self.left.draw(first * self.rank, (last - first) * self.rank, device).view(-1, self.rank)
        basis = self.basis.draw(0, self.rank * self.columns, device).to(self.dtype).to(torch.float32).view(self.rank, -1)
        total = torch.zeros(last - first, self.columns, device=device)
        for j in range(self.rank):  # one after another: the sum must not depend on the device or the piece
            total = total + left[:, j, None] * basis[j]
        return (total * self.rank**-0.5).flatten()[start - first * self.columns :][:count]


def rounding_bits(key: Key, start: int, count: int, device: torch.device) -> Tensor:
    """Uniform 16-bit integers for stochastic rounding: int64, shape ``[count]``, values in [0, 65536)."""
    first = start // 8
    words = torch.stack(_words(key, Purpose.ROUNDING, first, (start + count + 7) // 8, device), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return halves.flatten()[start - first * 8 :][:count]

"""Triton device functions with the bits of :mod:`zolightning.noise`.

Compile every kernel that calls them with ``enable_fp_fusion=False``: a fused multiply-add rounds once where the contract
rounds twice.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from zolightning import noise

_M0, _M1 = tl.constexpr(noise.PHILOX_M[0]), tl.constexpr(noise.PHILOX_M[1])
_W0, _W1 = tl.constexpr(noise.PHILOX_W[0]), tl.constexpr(noise.PHILOX_W[1])
_ROUNDS = tl.constexpr(noise.ROUNDS)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (tl.constexpr(c) for c in noise.LOG)
_LN2_HIGH, _LN2_LOW = tl.constexpr(noise.LN2_HIGH), tl.constexpr(noise.LN2_LOW)
_SQRT_HALF_BITS = tl.constexpr(noise.SQRT_HALF_BITS)
_S0, _S1, _S2 = (tl.constexpr(c) for c in noise.SIN)
_C0, _C1, _C2 = (tl.constexpr(c) for c in noise.COS)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_TO_ANGLE, _TO_UNIT = tl.constexpr(noise.TO_ANGLE), tl.constexpr(noise.TO_UNIT)


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Philox 4x32-10; ``c0`` uint32 of any shape, the rest uint32 scalars. Returns four uint32 tensors of that shape."""
    c1 = tl.zeros_like(c0) + c1
    c2 = tl.zeros_like(c0) + c2
    c3 = tl.zeros_like(c0) + c3
    for _ in tl.static_range(_ROUNDS):
        # Both halves of a product from one instruction: 32 bits times 32 bits are 64.
        p0 = c0.to(tl.uint64) * tl.full(c0.shape, _M0, tl.uint64)
        p1 = c2.to(tl.uint64) * tl.full(c0.shape, _M1, tl.uint64)
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = (k0 + tl.full((), _W0, tl.uint32)).to(tl.uint32)
        k1 = (k1 + tl.full((), _W1, tl.uint32)).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def log(u):
    """Natural logarithm of positive normal float32 numbers."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    z = f * f
    y = f * _L0 + _L1
    y = y * f + _L2
    y = y * f + _L3
    y = y * f + _L4
    y = y * f + _L5
    y = y * f + _L6
    y = y * f + _L7
    y = y * f + _L8
    y = y * f * z
    y = y + e * _LN2_LOW
    y = y - z * 0.5
    return (f + y) + e * _LN2_HIGH


@triton.jit
def cos_sin(word):
    """Cosine and sine of ``2 pi word / 2**32``.

    The two top bits of ``turned`` are the quadrant: its odd bit swaps the polynomials, its even one is the sign of the sine.
    """
    turned = word + tl.full((), 0x20000000, tl.uint32)
    f = ((turned & 0x3FFFFFFF) - tl.full((), 0x20000000, tl.uint32)).to(tl.int32, bitcast=True).to(tl.float32) * _TO_ANGLE
    z = f * f
    s = ((z * _S0 + _S1) * z + _S2) * z * f + f
    c = ((z * _C0 + _C1) * z + _C2) * z * z - z * 0.5 + 1.0
    odd = (turned & 0x40000000) != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return _flip(cos, turned + tl.full((), 0x40000000, tl.uint32)), _flip(sin, turned)


@triton.jit
def _flip(value, sign):
    """The value with its sign changed where the top bit of ``sign`` is set."""
    return (value.to(tl.uint32, bitcast=True) ^ (sign & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def root(x):
    """Square root, correctly rounded, of zero or a number between 2**-100 and 2**126.

    That is how the GPU's own rounds, without its look at the numbers beyond: a branch at which four roots would wait for one another.
    """
    if _INTERPRETED:
        y = tl.sqrt_rn(x)
    else:
        r = tl.math.rsqrt(x)
        s = x * r
        y = tl.where(x == 0.0, x, tl.fma(tl.fma(-s, s, x), r * 0.5, s))
    return y


@triton.jit
def box_muller(a, b):
    """Two standard normals from two 32-bit words."""
    radius = root(log((a.to(tl.float32) + 0.5) * _TO_UNIT) * -2.0)
    cos, sin = cos_sin(b)
    return radius * cos, radius * sin


@triton.jit
def place(i, COUNT: tl.constexpr, SHARED: tl.constexpr):
    """Which of ``COUNT`` octets in a row the one numbered ``i`` is: ``i`` itself, unless they share what is drawn.

    The 128 bits of a Philox call are the signs of 16 octets, four to a word. A thread that shares has the call to itself and makes four
    of those octets, one from each word, with three neighbours; its octets are ``COUNT // 4`` numbers apart.
    """
    if SHARED:
        i = (i & (COUNT // 4 - 4)) * 4 | i // (COUNT // 4) * 4 | i & 3
    return i


@triton.jit
def draw(
    k0, k1, first, block, step, stream, amount,
    GAUSSIAN: tl.constexpr, SHARED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """``amount`` times the noise of ``COUNT`` octets from ``first`` on: eight float32 tensors ``[COUNT]``, one a place in the octet.

    Octet ``i`` (of elements ``8 * i`` to ``8 * i + 7``) comes where :func:`place` has it; ``SHARED``, for signs alone, wants ``first``
    to be a multiple of 16. ``first`` and the key's words are uint32 scalars, and ``stream`` is ``query * 16 + purpose``.
    """
    octet = first + place(tl.arange(0, COUNT), COUNT, SHARED).to(tl.uint32)
    if GAUSSIAN:
        a0, a1, a2, a3 = philox(k0, k1, octet * 2, block, step, stream)
        b0, b1, b2, b3 = philox(k0, k1, octet * 2 + 1, block, step, stream)
        z0, z1 = box_muller(a0, a1)
        z2, z3 = box_muller(a2, a3)
        z4, z5 = box_muller(b0, b1)
        z6, z7 = box_muller(b2, b3)
        z0, z1, z2, z3 = z0 * amount, z1 * amount, z2 * amount, z3 * amount
        z4, z5, z6, z7 = z4 * amount, z5 * amount, z6 * amount, z7 * amount
    else:
        if SHARED:
            call = (first >> 4) + (tl.arange(0, COUNT // 4) // 4).to(tl.uint32)
            w0, w1, w2, w3 = philox(k0, k1, call, block, step, stream)
            words = tl.reshape(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)), [COUNT // 4, 4])
            word = tl.reshape(tl.trans(words), [COUNT])
        else:
            w0, w1, w2, w3 = philox(k0, k1, octet >> 4, block, step, stream)
            lane = (octet >> 2) & 3
            word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
        top = word << (24 - (octet & 3) * 8)  # the octet's byte, up where a sign is
        less = amount * -1.0  # what a bit of 0 stands for; a 1 changes its sign
        z0, z1, z2, z3 = _flip(less, top << 7), _flip(less, top << 6), _flip(less, top << 5), _flip(less, top << 4)
        z4, z5, z6, z7 = _flip(less, top << 3), _flip(less, top << 2), _flip(less, top << 1), _flip(less, top)
    return z0, z1, z2, z3, z4, z5, z6, z7


@triton.jit
def weave(a0, a1, a2, a3, a4, a5, a6, a7):
    """Eight tensors ``[N]``, one a place in the octet, as one ``[8 N]``. Each thread's octet stays its own: nothing is exchanged."""
    even = tl.interleave(tl.interleave(a0, a4), tl.interleave(a2, a6))
    odd = tl.interleave(tl.interleave(a1, a5), tl.interleave(a3, a7))
    return tl.interleave(even, odd)


@triton.jit
def rounding_bits(k0, k1, first, block, step, stream, SHARED: tl.constexpr, COUNT: tl.constexpr):
    """Uniform 16-bit integers for ``COUNT`` octets from ``first`` on: uint32, shape ``[8 * COUNT]``, in the order of :func:`draw`.

    ``stream`` is that of a direction.
    """
    octet = first + place(tl.arange(0, COUNT), COUNT, SHARED).to(tl.uint32)
    w0, w1, w2, w3 = philox(k0, k1, octet, block, step, stream + 1)
    return weave(w0 & 0xFFFF, w0 >> 16, w1 & 0xFFFF, w1 >> 16, w2 & 0xFFFF, w2 >> 16, w3 & 0xFFFF, w3 >> 16)

"""Stochastic rounding from float32 to 16 bits, in plain torch.

A value between two neighbours goes up with the probability that makes the result's mean the value itself, so that updates far
below one unit in the last place still arrive on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this the spacing of float16 is constant (2**-24), so the dropped bits are no longer the low bits of the float32.
HALF_TINY = 2.0**-14


def stochastic_round(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values to a 16-bit type.

    Args:
        value: float32, any shape.
        bits: int64 of that shape, uniform in [0, 65536); see :func:`zolightning.noise.rounding_bits`.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        ``dtype``, same shape, with mean ``value`` (to 2**-16 of the spacing).

    Example:
        >>> stochastic_round(torch.tensor([1.0]), torch.tensor([65535]), torch.bfloat16)
        tensor([1.], dtype=torch.bfloat16)
    """
    raw, bits = value.view(torch.int32), bits.to(torch.int32)
    if dtype == torch.bfloat16:
        return ((raw + bits) & -0x10000).view(torch.float32).to(dtype)
    normal = ((raw + (bits & 0x1FFF)) & -0x2000).view(torch.float32)
    scaled = value.abs() * 2.0**24
    floor = scaled.floor()
    up = (bits.to(torch.float32) * 2.0**-16) < (scaled - floor)
    tiny = torch.copysign((floor + up.to(torch.float32)) * 2.0**-24, value)
    return torch.where(value.abs() < HALF_TINY, tiny, normal).to(dtype)

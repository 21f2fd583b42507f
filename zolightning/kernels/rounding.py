"""Stochastic rounding from float32 to 16 bits, in plain torch.

A value between two neighbours goes up with the probability that makes the result's mean the value itself, so that updates far
below one unit in the last place still arrive on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Times this, float32 numbers have their exponent where float16 has it: the 13 bits to drop are then the lowest ones for normal and
# subnormal results alike.
TO_HALF = 2.0**-112
HALF_INFINITY, HALF_NAN = 0x7C00, 0x7E00


def stochastic_round(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values to a 16-bit type.

    Args:
        value: float32, any shape.
        bits: int64 of that shape, uniform in [0, 65536); see :func:`zolightning.noise.rounding_bits`.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        ``dtype``, same shape, with mean ``value`` (for subnormal float16 to 2**-14 of the spacing).

    Example:
        >>> stochastic_round(torch.tensor([1.0]), torch.tensor([65535]), torch.bfloat16)
        tensor([1.], dtype=torch.bfloat16)
    """
    bits = bits.to(torch.int32)
    if dtype == torch.bfloat16:
        return ((value.view(torch.int32) + bits) & -0x10000).view(torch.float32).to(dtype)
    raw = (value * TO_HALF).view(torch.int32)
    half = (((raw & 0x7FFFFFFF) + (bits & 0x1FFF)) >> 13).clamp_max(HALF_INFINITY)
    half = half.masked_fill(value != value, HALF_NAN)
    return (half | ((raw >> 16) & -0x8000)).to(torch.int16).view(torch.float16)

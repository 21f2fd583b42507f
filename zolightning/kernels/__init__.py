"""The passes over the weights: ``W + a z`` for a probe, and the update.

Both exist twice, with the same bits: :mod:`~zolightning.kernels.plain` (torch, anywhere) and :mod:`~zolightning.kernels.fused`
(Triton, CUDA). The functions here choose.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zolightning.kernels import plain
from zolightning.kernels.plain import compute_dtype
from zolightning.kernels.rounding import stochastic_round
from zolightning.noise import GaussianNoise, Noise, RademacherNoise

__all__ = ["compute_dtype", "materialise", "stochastic_round", "update"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _fusable(weight: Tensor, noises: Sequence[Noise]) -> bool:
    """Whether the kernels draw the very same numbers: known noise, unchanged by a subclass, with consecutive queries."""
    kind, first = type(noises[0]), noises[0].key
    return (
        weight.is_cuda
        and _HAS_TRITON
        and weight.dtype != torch.float64
        and kind in (GaussianNoise, RademacherNoise)
        and all(type(n) is kind and n.key == replace(first, query=first.query + q) for q, n in enumerate(noises))
    )


def materialise(weight: Tensor, amount: Tensor, noise: Noise) -> Tensor:
    r"""Perturbed copy :math:`W + a z`, rounded once to the nearest value of the weights' type.

    Args:
        weight: Any shape; float32, bfloat16, float16 or float64. Only read.
        amount: The factor ``a``: 0-d, float32 (float64 for float64 weights), on the weights' device.
        noise: Where ``z`` comes from.

    Returns:
        New contiguous tensor of the same shape and dtype.
    """
    if _fusable(weight, (noise,)):
        from zolightning.kernels import fused

        return fused.materialise(weight, amount, noise)
    return plain.materialise(weight, amount, noise)


def update(weight: Tensor, amounts: Tensor, noises: Sequence[Noise], shrink: float, valid: Tensor) -> None:
    r"""In-place step :math:`W \leftarrow W + (\sum_q a_q z_q - r W)`; 16-bit weights are rounded stochastically.

    Args:
        weight: Contiguous tensor, any shape.
        amounts: The factors ``a_q``: shape ``[Q]``, float32 (float64 for float64 weights).
        noises: ``Q`` noises of one block and step, with consecutive queries.
        shrink: The rate ``r`` of weight decay; 0 for none. It is not a factor ``1 - r``, which float32 would round to 1.
        valid: 0-d bool on the weights' device; false leaves the weights as they are.

    The rounding bits belong to the first noise's key.
    """
    if _fusable(weight, noises):
        from zolightning.kernels import fused

        fused.update(weight, amounts, noises, shrink, valid)
    else:
        plain.update(weight, amounts, noises, shrink, valid)

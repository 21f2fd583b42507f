"""The passes over the weights: ``W ± a z`` for a probe, and the update.

Both exist twice, with the same bits: :mod:`~zolightning.kernels.plain` (torch, anywhere) and :mod:`~zolightning.kernels.fused`
(Triton, CUDA). A :class:`Pack` chooses, for many tensors at once; the functions here are its forms for one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zolightning.kernels.pack import Pack, Update, drawn, fold, rows, scalar
from zolightning.kernels.plain import compute_dtype
from zolightning.kernels.rounding import stochastic_round
from zolightning.noise import Noise

__all__ = ["Pack", "Update", "compute_dtype", "drawn", "fold", "materialise", "rows", "scalar", "stochastic_round", "update"]


def materialise(weight: Tensor, amount: Tensor, noise: Noise) -> Tensor:
    """One tensor's :meth:`Pack.materialise`: ``weight + amount * z``, contiguous, of the same shape."""
    return Pack([weight], [noise.key.block]).materialise(amount.reshape(1), [noise])[0][0]


def update(weight: Tensor, amounts: Tensor, noises: Sequence[Noise], shrink: Tensor | float, valid: Tensor) -> None:
    """One tensor's :meth:`Pack.update`; ``amounts`` and ``noises`` have one entry a query."""
    Pack([weight], [noises[0].key.block]).update(amounts[:, None], [[noise] for noise in noises], shrink, valid)

"""Scales of comparable size, whatever a policy gives: the same perturbation energy as uniform scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zolightning.policies.layout import BlockInfo


@dataclass(frozen=True)
class Normaliser:
    r"""Multiplies raw scales by one number :math:`\nu` so that the mean square of a perturbation is 1.

    .. math:: \tilde\sigma_i = \nu\,\sigma_i, \qquad \nu = \sqrt{\textstyle\sum_i d_i \,/\, \sum_i d_i \sigma_i^2},
              \qquad\text{hence}\qquad \textstyle\sum_i d_i \tilde\sigma_i^2 = \sum_i d_i .

    Args:
        rule: exact: ``d_i`` is the number of elements. published: as in the paper's code, where a matrix with "embed" in its name
            counts ``15 * batch_size * columns``. none: scales stay raw.
        batch_size: Examples per step in the published rule; in the paper 16 for fine-tuning and 8 for meta-training.
        detached: No gradient flows through the factor, as in the paper's code; matters for meta-training only.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> shares = Normaliser().shares([BlockInfo("a", (3,)), BlockInfo("b", (1,))])
        >>> Normaliser()(torch.tensor([1.0, 0.0]), shares)
        tensor([1.1547, 0.0000])

    References:
        "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv 2510.00419.
    """

    rule: Literal["exact", "published", "none"] = "exact"
    batch_size: int = 16
    detached: bool = False

    def __post_init__(self) -> None:
        if self.rule not in ("exact", "published", "none"):
            raise ValueError(f"rule={self.rule!r} must be 'exact', 'published' or 'none'")
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be a positive integer")
        if type(self.detached) is not bool:
            raise ValueError(f"detached={self.detached!r} must be true or false")

    def shares(self, blocks: Sequence[BlockInfo]) -> Tensor:
        """The sizes ``d_i`` as shares of their sum: float64, shape ``[blocks]``."""
        sizes = [self._size(block) for block in blocks]
        whole = math.fsum(sizes)
        return torch.tensor([size / whole for size in sizes], dtype=torch.float64, device="cpu")

    def _size(self, block: BlockInfo) -> int:
        if self.rule == "published" and "embed" in block.name and block.shape is not None and len(block.shape) > 1:
            return 15 * self.batch_size * block.shape[1]
        return block.numel

    def __call__(self, raw: Tensor, shares: Tensor) -> Tensor:
        """Normalise.

        Args:
            raw: Raw scales: shape ``[blocks]``.
            shares: What :meth:`shares` gave, on the same device.

        Returns:
            Scales of the same shape and dtype.
        """
        if self.rule == "none":
            return raw
        factor = (shares.to(raw.dtype) * raw.square()).sum().rsqrt()
        return raw * (factor.detach() if self.detached else factor)

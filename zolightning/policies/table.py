"""A fixed scale for each block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zolightning.policies.base import Policy
from zolightning.policies.features import Features
from zolightning.policies.layout import BlockInfo
from zolightning.policies.normalise import Normaliser


class Table(Policy):
    r"""One trainable number per block: :math:`\sigma_i = |t_i|`, at first 1. Closed forms are tables.

    Args:
        normaliser: Gives the scales their size; without it: exact.

    Example:
        >>> blocks = [BlockInfo("a", (3,)), BlockInfo("b", (1,))]
        >>> table = Table.of(blocks, torch.tensor([1.0, 0.0]))
        >>> table.normalise(table(Features(blocks))).tolist()
        [1.154700517654419, 0.0]
    """

    per_block = ("values",)
    values: Tensor

    def __init__(self, normaliser: Normaliser | None = None) -> None:
        super().__init__(normaliser)

    @classmethod
    def of(cls, blocks: Sequence[BlockInfo], scales: Tensor, normaliser: Normaliser | None = None) -> Table:
        """The table with these scales.

        Args:
            blocks: The blocks.
            scales: Raw scales: shape ``[blocks]``.
            normaliser: Gives the scales their size; without it: exact.

        Raises:
            ValueError: There are not as many scales as blocks, or one is negative or not finite.
        """
        if tuple(scales.shape) != (len(blocks),):
            raise ValueError(f"scales have shape {tuple(scales.shape)} for {len(blocks)} blocks")
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise ValueError("scales must be finite and not negative")
        table = cls(normaliser).bind(blocks)
        table.values.data.copy_(scales)
        return table

    def initial(self) -> dict[str, Tensor]:
        return {"values": torch.ones(len(self.blocks))}

    def forward(self, features: Features) -> Tensor:
        return self.values.abs()

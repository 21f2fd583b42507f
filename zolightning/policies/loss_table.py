"""A scale for each block at each of a few levels of the loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zolightning.policies.base import Policy
from zolightning.policies.features import Features
from zolightning.policies.layout import BlockInfo
from zolightning.policies.normalise import Normaliser


class LossTable(Policy):
    r"""One number per block and level of the loss; between two levels the squares of the scales are interpolated.

    .. math:: \sigma_i^2 = \sum_k w_k(\ell)\, t_{ik}^2, \qquad \ell = \tfrac12 (\ell_+ + \ell_-) \text{ of the previous step},

    where :math:`w_k` falls linearly from 1 at level ``k`` to 0 at its neighbours; outside of the levels the nearest one counts alone, and
    so does the highest before the first step. A model that has still to learn the form of an answer moves in other blocks
    than one that has to tell two answers apart, and the loss says which of the two it is.

    Args:
        levels: The levels in nats, ascending.
        normaliser: Gives the scales their size; without it: exact.

    Raises:
        ValueError: There is no level, one is not positive and finite, or they do not ascend.

    Example:
        >>> blocks = [BlockInfo("a", (1,)), BlockInfo("b", (1,))]
        >>> table = LossTable.of(blocks, [0.5, 1.5], torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([4.0, 1.0]))
        >>> features = Features.reference(blocks, loss=1.0)
        >>> table(features).square().tolist()  # half of each level; both have the same curvature
        [0.625, 2.5]
    """

    per_block = ("values",)
    values: Tensor
    knots: Tensor

    def __init__(self, levels: Sequence[float] = (0.8, 1.2), normaliser: Normaliser | None = None) -> None:
        super().__init__(normaliser)
        if not levels or not all(isinstance(level, (int, float)) and 0 < level < math.inf for level in levels):
            raise ValueError(f"levels={list(levels)} must be positive and finite, at least one")
        if any(low >= high for low, high in itertools.pairwise(levels)):
            raise ValueError(f"levels={list(levels)} must ascend")
        self.levels = tuple(float(level) for level in levels)
        self.register_buffer("knots", torch.tensor(self.levels), persistent=False)

    @classmethod
    def of(cls, blocks: Sequence[BlockInfo], levels: Sequence[float], scales: Tensor, curvature: Tensor) -> LossTable:
        r"""The policy with these scales, each level in units of the same curvature, :math:`\sum_i \sigma_i^2 F_i = \sum_i F_i`.

        So a learning rate that holds at one level holds at the others; scales are not normalised beyond that.

        Args:
            blocks: The blocks.
            levels: Of the loss.
            scales: Raw scales: shape ``[blocks, levels]``.
            curvature: ``F``, the curvature of each block: shape ``[blocks]``.

        Raises:
            ValueError: Shapes differ, a number is negative or not finite, or a level has no block with scale and curvature.
        """
        if tuple(scales.shape) != (len(blocks), len(levels)) or tuple(curvature.shape) != (len(blocks),):
            raise ValueError(
                f"scales and curvature have shapes {tuple(scales.shape)} and {tuple(curvature.shape)} "
                f"for {len(blocks)} blocks and {len(levels)} levels"
            )
        for name, value in (("scales", scales), ("curvature", curvature)):
            if not bool((torch.isfinite(value) & (value >= 0)).all()):
                raise ValueError(f"{name} must be finite and not negative")
        cost = (scales.double().square() * curvature.double()[:, None]).sum(0) / curvature.double().sum()
        if not bool((cost > 0).all()):
            raise ValueError(
                f"levels {[level for level, one in zip(levels, cost, strict=True) if not one > 0]} move nothing that has curvature"
            )
        table = cls(levels, Normaliser("none")).bind(blocks)
        table.values.data.copy_(scales.double() / cost.sqrt())
        return table

    def initial(self) -> dict[str, Tensor]:
        return {"values": torch.ones(len(self.blocks), len(self.levels))}

    def forward(self, features: Features) -> Tensor:
        loss = features.losses.mean().to(self.knots)
        loss = torch.where((loss == 0) & (features.step == 0), self.knots[-1], loss)  # no loss has been seen yet
        passed = ((loss - self.knots[:-1]) / self.knots.diff()).clamp(0.0, 1.0)  # how much of each gap between levels lies below the loss
        weights = torch.cat([torch.ones_like(loss)[None], passed]) - torch.cat([passed, torch.zeros_like(loss)[None]])
        squares = self.values.square() @ weights
        return torch.where(squares > 0, squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt(), 0.0)  # a root's slope at 0 is infinite

"""Directions of low rank."""

from __future__ import annotations

from zolightning.blocks import Block
from zolightning.noise import GaussianNoise, Key, LowRankNoise, Noise
from zolightning.samplers.base import Sampler


class LowRankSampler(Sampler):
    r"""Directions :math:`z = B A / \sqrt{r}` for matrices, Gaussian ones for everything else.

    :math:`B` (as high as the matrix, :math:`r` columns) is new in every direction, :math:`A` every ``window`` steps. A probe does not
    touch the weights: a linear map computes :math:`y = W x \pm \epsilon\sigma\, B (A x) / \sqrt{r}` for both signs at once, and an
    embedding adds to the rows that it looks up, so a step costs little more than its forwards. What is applied is what was probed, in
    every step of a window. Over windows :math:`E[z z^\top] = I`; inside one the weights move in the span of its :math:`A` alone.

    Args:
        rank: Rank ``r`` of the directions. Matrices with a side of no more than this get Gaussian ones.
        window: Steps until a new ``A``.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> optimizer = ZOOptimizer(DenseSpace(model), LowRankSampler(rank=4))

    References:
        Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures" (LOZO), ICLR 2025.
    """

    capturable = True
    constant_scales = True

    def __init__(self, rank: int = 8, window: int = 50) -> None:
        for name, value in (("rank", rank), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.rank, self.window = rank, window

    def noise(self, block: Block, key: Key) -> Noise:
        shape = block.tensor.shape
        if len(shape) != 2 or min(shape) <= self.rank:
            return GaussianNoise(key)
        return LowRankNoise(key, columns=shape[1], rank=self.rank, window=self.window, dtype=block.dtype)

"""Isotropic Gaussian directions."""

from __future__ import annotations

from zolightning.blocks import Block
from zolightning.noise import GaussianNoise, Key, Noise
from zolightning.samplers.base import Sampler


class GaussianSampler(Sampler):
    r"""Directions :math:`z \sim N(0, I)`: the sampler of MeZO.

    Example:
        >>> optimizer = ZOOptimizer(DenseSpace(model), GaussianSampler())

    References:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023.
    """

    capturable = True
    constant_scales = True

    def noise(self, block: Block, key: Key) -> Noise:
        return GaussianNoise(key)

"""The same scale everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from zolightning.policies.base import Policy
from zolightning.policies.features import Features


class Uniform(Policy):
    r"""All scales are 1: the sampler of MeZO.

    Example:
        >>> sampler = PolicySampler(Uniform())
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, features: Features) -> Tensor:
        return torch.ones_like(features.mean)

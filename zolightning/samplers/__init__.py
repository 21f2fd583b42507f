"""Distributions of the directions."""

from zolightning.samplers.base import Direction, Sampler
from zolightning.samplers.gaussian import GaussianSampler
from zolightning.samplers.low_rank import LowRankSampler
from zolightning.samplers.policy import PolicySampler
from zolightning.samplers.rademacher import RademacherSampler

__all__ = ["Direction", "GaussianSampler", "LowRankSampler", "PolicySampler", "RademacherSampler", "Sampler"]

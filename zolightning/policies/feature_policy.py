"""One small function of the features, shared by all blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from zolightning.policies.base import Policy
from zolightning.policies.features import STANDARD, Features
from zolightning.policies.initial import philox_uniform
from zolightning.policies.normalise import Normaliser


class FeaturePolicy(Policy):
    r"""The logarithm of a scale is a function of the block's features, equal for all blocks, plus a number of the block's own.

    .. math:: \log \sigma_i = f(x_i) + o_i, \qquad f(x) = w^\top x \quad\text{or}\quad f(x) = w^\top \tanh(V x + a)

    :meth:`Features.standard` names the features: kind of block, depth, size, statistics of the weights, loss, progress. All weights
    start so that the scales are uniform. What is shared carries over to other blocks; the offsets go to the matching ones.

    Args:
        hidden: Width of the inner layer; 0: a linear function.
        offset: Whether each block has a number of its own.
        seed: Seed of the inner layer's initial weights.
        normaliser: Gives the scales their size; without it: exact.

    Raises:
        ValueError: ``hidden``, ``offset`` or ``seed`` is out of range.

    Example:
        >>> policy = FeaturePolicy(hidden=8).bind([BlockInfo("layers.0.mlp.up_proj.weight", (8, 4))])
        >>> policy(Features(policy.blocks))
        tensor([1.], grad_fn=<ExpBackward0>)
    """

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    offsets: Tensor

    def __init__(self, hidden: int = 0, offset: bool = True, seed: int = 0, normaliser: Normaliser | None = None) -> None:
        super().__init__(normaliser)
        if type(hidden) is not int or not 0 <= hidden <= 1 << 12:
            raise ValueError(f"hidden={hidden!r} must be an integer between 0 and 4096")
        if type(offset) is not bool:
            raise ValueError(f"offset={offset!r} must be true or false")
        if type(seed) is not int or not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed!r} must be between 0 and 2**64 - 1")
        self.hidden, self.offset, self.seed = hidden, offset, seed
        self.per_block = ("offsets",) if offset else ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = len(STANDARD)
        inner = {"weight_in": (width, self.hidden), "bias_in": (self.hidden,)} if self.hidden else {}
        own = {"offsets": (len(self.blocks),)} if self.offset else {}
        return {**inner, "weight_out": (self.hidden or width,), **own}

    def initial(self) -> dict[str, Tensor]:
        values = {name: torch.zeros(shape) for name, shape in self.shapes().items()}
        if self.hidden:
            width = len(STANDARD)
            values["weight_in"] = philox_uniform(self.seed, range(width), (self.hidden,), width**-0.5)
        return values

    def forward(self, features: Features) -> Tensor:
        x = features.standard().to(self.weight_out.dtype)
        if self.hidden:
            x = (x @ self.weight_in + self.bias_in).tanh()
        logarithm = x @ self.weight_out
        return (logarithm + self.offsets if self.offset else logarithm).exp()

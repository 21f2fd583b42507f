"""The published policy: one small network for each block."""

from __future__ import annotations

import torch
from torch import Tensor

from zolightning.policies.base import Policy
from zolightning.policies.features import Features
from zolightning.policies.initial import philox_uniform
from zolightning.policies.normalise import Normaliser

INPUTS = 5


class PertNN(Policy):
    r"""A network of its own for every block, all evaluated in one batched call.

    .. math:: \sigma_{i,t} = \bigl|\, w_i^\top \tanh(V_i x_{i,t} + a_i) + b_i \bigr|, \qquad
              x_{i,t} = \bigl(\mathrm{mean}\,W_i,\ \mathrm{var}\,W_i,\ \ell^+_{t-1},\ \ell^-_{t-1},\ \sigma_{i,t-1}\bigr)

    The scale that is fed back is the raw one. Before the first step the losses are 0 and the scales 1. The initial weights are those
    that the paper's code draws on one GPU with the same seed.

    Args:
        hidden: Width of the networks.
        seed: Seed of the initial weights.
        normaliser: Gives the scales their size; without it: exact.

    Raises:
        ValueError: ``hidden`` or ``seed`` is out of range.

    Example:
        >>> policy = PertNN().bind([BlockInfo("layers.0.mlp.up_proj.weight", (8, 4))])
        >>> policy.n_params
        449

    References:
        "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv 2510.00419.
    """

    per_block = ("weight_in", "bias_in", "weight_out", "bias_out")
    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor

    def __init__(self, hidden: int = 64, seed: int = 42, normaliser: Normaliser | None = None) -> None:
        super().__init__(normaliser)
        if type(hidden) is not int or not 1 <= hidden <= 1 << 16:
            raise ValueError(f"hidden={hidden!r} must be an integer between 1 and 65536")
        if type(seed) is not int or not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed!r} must be between 0 and 2**64 - 1")
        self.hidden, self.seed = hidden, seed

    def shapes(self) -> dict[str, tuple[int, ...]]:
        n, h = len(self.blocks), self.hidden
        return {"weight_in": (n, h, INPUTS), "bias_in": (n, h), "weight_out": (n, h), "bias_out": (n,)}

    def initial(self) -> dict[str, Tensor]:
        bounds = (INPUTS**-0.5, INPUTS**-0.5, self.hidden**-0.5, self.hidden**-0.5)
        values = {}
        for part, ((name, (blocks, *shape)), bound) in enumerate(zip(self.shapes().items(), bounds, strict=True)):
            drawn_before = range(part, 4 * blocks, 4)  # the paper draws the four tensors of a block, then those of the next
            values[name] = philox_uniform(self.seed, drawn_before, shape, bound)
        return values

    def forward(self, features: Features) -> Tensor:
        plus, minus = features.losses.expand(len(self.blocks), 2).unbind(1)
        x = torch.stack([features.mean, features.variance, plus, minus, features.sigma], dim=1).to(self.weight_in.dtype)
        inner = torch.baddbmm(self.bias_in[:, None], x[:, None], self.weight_in.mT)[:, 0].tanh()  # [blocks, hidden]
        return ((inner * self.weight_out).sum(dim=1) + self.bias_out).abs()

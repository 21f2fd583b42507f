"""Directions with the scales of a policy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zolightning.blocks import Block
from zolightning.noise import Key, Noise
from zolightning.policies import BlockInfo, Features, Match, Policy, load_policy
from zolightning.samplers.base import HasBlocks, Sampler
from zolightning.samplers.gaussian import GaussianSampler


class PolicySampler(Sampler):
    r"""Block :math:`i` gets :math:`\tilde\sigma_i z_i`: the noise of another sampler, with scales that a policy computes in each step.

    The policy sees the losses of the previous step, its own previous raw scales, and statistics of the weights. A policy for a base
    model also serves blocks that stand beside its weights, such as adapters of its linear maps and scales of its packed weights:
    each gets the scale of the weight that it changes, from the statistics of that weight.

    Args:
        policy: File of a policy, name of a shipped one, or a policy itself.
        base: Distribution of the noise; without it: Gaussian. Its own scales are not used.
        refresh_every: Steps between two looks at the weights; 1: in each step, as in the paper.
        match: exact: the policy must be for blocks of the same names and shapes. kind: blocks are matched by kind and relative depth.

    Raises:
        ValueError: There is no such policy, its file is damaged, it is for other blocks, or an argument is out of range.

    Example:
        >>> optimizer = ZOOptimizer(DenseSpace(model), PolicySampler("policy.safetensors"))  # doctest: +SKIP

    References:
        "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv 2510.00419.
    """

    def __init__(self, policy: str | Policy, base: Sampler | None = None, refresh_every: int = 200, match: Match = "exact") -> None:
        if refresh_every < 1:
            raise ValueError(f"refresh_every={refresh_every} must be at least 1")
        if match not in ("exact", "kind"):
            raise ValueError(f"match={match!r} must be 'exact' or 'kind'")
        self._unbound = load_policy(policy) if isinstance(policy, str) else policy
        self.base = base if base is not None else GaussianSampler()
        self.second_moment, self.capturable = self.base.second_moment, self.base.capturable
        self.refresh_every = refresh_every
        self.match: Match = match

    @torch.no_grad()
    def bind(self, space: HasBlocks) -> None:
        super().bind(space)
        self.base.bind(space)
        infos = [BlockInfo.of(block) for block in self.blocks]
        device = self.blocks[0].tensor.device
        wide = any(block.dtype == torch.float64 for block in self.blocks)
        #: The policy for the blocks of this space.
        self.policy = self._unbound.bind(infos, self.match).to(device)
        #: What the policy sees.
        self.features = Features(infos, device, torch.float64 if wide else torch.float32)
        self._raw = torch.ones_like(self.features.sigma)
        self._scales = torch.ones(len(self.blocks), dtype=torch.float32, device=device)
        self._expected = 0  # the step for which the scales are ready
        self._measure()
        scales = self._scales
        if not bool(torch.isfinite(scales).all()) or not bool((scales > 0).any()):
            raise ValueError(f"the policy gives no usable scales: they range from {scales.min():g} to {scales.max():g}")

    def noise(self, block: Block, key: Key) -> Noise:
        return self.base.noise(block, key)

    def scales(self) -> Tensor:
        return self._scales.clone()

    @torch.no_grad()
    def restrict(self, scales: Tensor, active: Tensor) -> Tensor:
        """The blocks that move have among them the size that all would have."""
        return self.policy.normalise(scales, active)

    @torch.no_grad()
    def observe(self, losses: Tensor) -> None:
        """Take note of the losses and get the scales of the next step ready, while the weights are being moved."""
        self.base.observe(losses)
        self.features.observe(losses, self._raw)
        self.features.step.add_(1)
        self._compute()

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        self.base.refresh(step)
        self.features.step.fill_(step)
        if step % self.refresh_every == 0:
            self._measure()
        elif step != self._expected:  # the first step of a resumed run, or one that is taken again
            self._compute()
        self._expected = step + 1

    def reads_weights(self, step: int) -> bool:
        return step % self.refresh_every == 0 or self.base.reads_weights(step)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self._expected = -1

    def _measure(self) -> None:
        self.features.measure(block.weight for block in self.blocks)
        self._compute()

    def _compute(self) -> None:
        """The scales that follow from the features, into tensors that stay."""
        self._raw.copy_(self.policy(self.features))
        self._scales.copy_(self.policy.normalise(self._raw))

    def state(self) -> dict[str, Tensor]:
        return {**self.features.state(), **{f"base.{name}": tensor for name, tensor in self.base.state().items()}}

"""The field's usual loop, written plainly: perturb the weights in place, walk back, update.

This is the baseline. It is what MeZO's trainer does (Malladi et al., 2023), with one courtesy: the loss is computed in float32, as
ours is. In 16 bits the walk ``+eps, -2 eps, +eps`` does not return to where it started, and small updates round away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Textbook:
    """MeZO's in-place loop.

    Args:
        model: The network, in evaluation mode.
        lr: Learning rate.
        eps: Probe distance.
        seed: Seed of the sequence of step seeds.
    """

    def __init__(self, model: nn.Module, lr: float, eps: float = 1e-3, seed: int = 0) -> None:
        self.parameters = list(model.parameters())
        self.lr, self.eps = lr, eps
        self.forwards = 0
        self._seeds = torch.Generator().manual_seed(seed)
        self._noise = torch.Generator(self.parameters[0].device)

    def _walk(self, step_seed: int, scale: float) -> None:
        self._noise.manual_seed(step_seed)
        for parameter in self.parameters:
            z = torch.randn(parameter.shape, generator=self._noise, device=parameter.device, dtype=parameter.dtype)
            parameter.data.add_(z, alpha=scale)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step; returns the mean of the two losses."""
        step_seed = int(torch.randint(0, 1 << 31, (1,), generator=self._seeds))
        self._walk(step_seed, self.eps)
        plus = closure()
        self._walk(step_seed, -2 * self.eps)
        minus = closure()
        self._walk(step_seed, self.eps)
        coefficient = float(plus - minus) / (2 * self.eps)
        self._walk(step_seed, -self.lr * coefficient)
        self.forwards += 2
        return (plus + minus) / 2

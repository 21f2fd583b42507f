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


class Released:
    """MeZO's loop operation by operation as its trainer runs it, for timing: new tensors in every walk, all logits of all candidates.

    :class:`Textbook` computes the same with fewer launches; accuracy is compared with that one.

    Args:
        model: The network, in evaluation mode.
        lr: Learning rate.
        eps: Probe distance.
    """

    def __init__(self, model: nn.Module, lr: float, eps: float = 1e-3) -> None:
        self.model, self.lr, self.eps = model, lr, eps
        self.named = list(model.named_parameters())

    def _walk(self, step_seed: int, factor: float) -> None:
        torch.manual_seed(step_seed)
        for _, parameter in self.named:
            z = torch.normal(mean=0, std=1, size=parameter.size(), device=parameter.device, dtype=parameter.dtype)
            parameter.data = parameter.data + factor * z * self.eps

    def _loss(self, sequences: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy over candidates, each a sequence of its own whose last token is scored."""
        logits = self.model(input_ids=sequences, attention_mask=torch.ones_like(sequences), use_cache=False).logits
        log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        picked = log_probs.gather(-1, sequences[:, 1:, None])[:, -1, 0]
        return torch.nn.functional.cross_entropy(picked.view(label.shape[0], -1), label)

    @torch.no_grad()
    def step(self, sequences: Tensor, label: Tensor) -> Tensor:
        """One step.

        Args:
            sequences: Prompt and candidate, ``[B * K, T]``; the candidates of an example are neighbours.
            label: Right candidates, ``[B]``.
        """
        step_seed = int(torch.randint(1000000000, (1,)))
        self._walk(step_seed, 1)
        plus = self._loss(sequences, label)
        self._walk(step_seed, -2)
        minus = self._loss(sequences, label)
        coefficient = ((plus - minus) / (2 * self.eps)).item()
        self._walk(step_seed, 1)
        torch.manual_seed(step_seed)
        for _, parameter in self.named:
            z = torch.normal(mean=0, std=1, size=parameter.size(), device=parameter.device, dtype=parameter.dtype)
            parameter.data = parameter.data - self.lr * (coefficient * z)
        return plus

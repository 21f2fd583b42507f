"""What an objective is: per-row losses of a batch. Bound to a batch it is the closure of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.objectives.batch import Batch, repeat, size, split


def total(loss_sum: Tensor, weight: Tensor) -> Tensor:
    r"""The loss of each copy, :math:`\sum_b s_b / \sum_b w_b`, in a fixed order.

    Args:
        loss_sum: Shape ``[copies, B]``.
        weight: Shape ``[copies, B]``.

    Returns:
        Shape ``[copies]``.
    """
    return loss_sum.sum(dim=-1) / weight.sum(dim=-1)


class Objective(ABC):
    """Per-row losses of a model on a batch.

    Example:
        >>> class LogitPenalty(Objective):
        ...     def rows(self, model, batch):
        ...         out = model(batch["input_ids"]).logits.float().square().mean(dim=(1, 2))
        ...         return out, torch.ones_like(out)
    """

    #: Whether one loss takes several forwards (generation), so that a probe must hold its perturbed weights.
    several_forwards: bool = False
    #: Whether a CUDA graph may replay the loss: it depends on the batch's tensors alone, and nothing in it looks at their values.
    capturable: bool = False
    #: Whether the loss compares the candidates of a row, so that training batches hold all of them, not the right one alone.
    compares: bool = False

    def prepare(self, tokenizer: Any, examples: Sequence[Any]) -> None:  # noqa: B027
        """Called once before training, with the tokenizer and the training rows as text; ``batch["index"]`` points into them."""

    @abstractmethod
    def rows(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss sum and weight of each example.

        Args:
            model: The network.
            batch: See :mod:`zolightning.objectives.batch`.

        Returns:
            Two tensors of shape ``[B]``, float32 or wider; the loss is the ratio of their sums.
        """

    def on(self, model: nn.Module, batch: Batch, micro_batch_size: int | None = None) -> BoundObjective:
        """Bind to a batch: a closure for :meth:`zolightning.ZOOptimizer.step`."""
        return BoundObjective(self, model, batch, micro_batch_size)


class BoundObjective:
    """An objective on one batch: callable like any closure, and able to tell the rows apart.

    Args:
        objective: The objective.
        model: The network.
        batch: The batch.
        micro_batch_size: Examples per forward; ``None``: all at once.
    """

    def __init__(self, objective: Objective, model: nn.Module, batch: Batch, micro_batch_size: int | None = None) -> None:
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} must be at least 1")
        self.objective, self.model, self.batch, self.micro_batch_size = objective, model, batch, micro_batch_size

    def to(self, batch: Batch) -> BoundObjective:
        """The same objective on another batch."""
        return BoundObjective(self.objective, self.model, batch, self.micro_batch_size)

    @property
    def hold(self) -> bool:
        """Whether a probe must hold its perturbed weights."""
        return self.objective.several_forwards

    def __call__(self) -> Tensor:
        """The loss: 0-d."""
        return total(*self.rows(1))[0]

    def rows(self, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Loss sums and weights, both ``[copies, B]``, of ``copies`` forwards of the batch laid end to end."""
        parts = [self._part(part, copies) for part in split(self.batch, self.micro_batch_size)]
        losses, weights = zip(*parts, strict=True)
        return torch.cat(losses, dim=1), torch.cat(weights, dim=1)

    def _part(self, batch: Batch, copies: int) -> tuple[Tensor, Tensor]:
        loss, weight = self.objective.rows(self.model, repeat(batch, copies))
        return loss.view(copies, size(batch)), weight.view(copies, size(batch))

"""Update rules: coefficients and directions in, a change of the weights out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor


class Move(NamedTuple):
    r"""The change :math:`\theta \leftarrow \theta - r\,\theta + \sum_q w_q u_q`.

    Args:
        weights: The factors ``w_q``: shape ``[queries]``.
        shrink: The rate ``r`` of weight decay: 0-d.
    """

    weights: Tensor
    shrink: Tensor


class Rule(ABC):
    """Turns the coefficients of a step into a :class:`Move`."""

    #: Whether a CUDA graph may replay :meth:`move`: it depends on its arguments alone.
    capturable: bool = False

    @abstractmethod
    def move(self, coefficients: Tensor, lr: Tensor) -> Move:
        """The step's move.

        Args:
            coefficients: One per direction, shape ``[queries]``; ``sum_q c_q u_q`` estimates the gradient.
            lr: Learning rate: 0-d, on the device. The move is part of a CUDA graph, so it must not wait for its value.
        """


class SGD(Rule):
    r"""Plain step with decoupled weight decay.

    .. math:: \theta \leftarrow (1 - \eta \lambda)\,\theta - \eta \sum_q c_q u_q

    Args:
        weight_decay: The rate :math:`\lambda`, applied to every block.

    Raises:
        ValueError: ``weight_decay`` is negative or not finite.

    Example:
        >>> SGD().move(torch.tensor([2.0]), lr=torch.tensor(0.5))
        Move(weights=tensor([-1.]), shrink=tensor(0.))
    """

    capturable = True

    def __init__(self, weight_decay: float = 0.0) -> None:
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay={weight_decay} must be finite and not negative")
        self.weight_decay = weight_decay

    def move(self, coefficients: Tensor, lr: Tensor) -> Move:
        return Move(coefficients * -lr, lr * self.weight_decay)

"""What an estimator is: the probes of a step, and what their losses say about each direction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor


class Probe(NamedTuple):
    """One loss evaluation at ``theta + sign * eps * u``, with ``u`` the direction of number ``query``."""

    query: int
    sign: int


class Estimator(ABC):
    r"""Turns probe losses into one coefficient per direction.

    The gradient estimate is :math:`\hat g = \sum_q c_q u_q`, so an average over directions is part of the coefficients.

    Args:
        queries: Directions per step.

    Raises:
        ValueError: ``queries`` is below 1.
    """

    def __init__(self, queries: int = 1) -> None:
        if queries < 1:
            raise ValueError(f"queries={queries} must be at least 1")
        self.queries = queries

    @property
    @abstractmethod
    def probes(self) -> tuple[Probe, ...]:
        """The loss evaluations of one step, in order; their number is the step's count of forwards."""

    @abstractmethod
    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        """Coefficient of each direction.

        Args:
            losses: Shape ``[probes]``, in the order of :attr:`probes`; float32 or float64.
            eps: Probe distance.

        Returns:
            Shape ``[queries]``, same dtype and device.
        """

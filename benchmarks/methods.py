"""The methods that a grid compares: functions ``(model, lr, seed, **arguments) -> stepper`` with ``step(closure)`` and ``forwards``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from benchmarks.textbook import Textbook
from zolightning import DenseSpace, TwoPoint, ZOOptimizer, samplers


class Stepper(Protocol):
    """What the grid needs of a method."""

    forwards: int

    def step(self, closure: Callable[[], Tensor]) -> Tensor: ...


def exact(model: nn.Module, lr: float, seed: int, eps: float = 1e-3, sampler: str = "GaussianSampler", queries: int = 1) -> ZOOptimizer:
    """Read-only probes and stochastic rounding, uniform scales."""
    return ZOOptimizer(DenseSpace(model), getattr(samplers, sampler)(), TwoPoint(queries), lr=lr, eps=eps, seed=seed)


def textbook(model: nn.Module, lr: float, seed: int, eps: float = 1e-3) -> Textbook:
    """The in-place loop."""
    return Textbook(model, lr=lr, eps=eps, seed=seed)


def build(path: str, model: nn.Module, lr: float, seed: int, arguments: dict[str, Any]) -> Stepper:
    """Look a method up by ``module.function`` and call it."""
    module, _, name = path.rpartition(".")
    stepper: Stepper = getattr(importlib.import_module(module), name)(model, lr, seed, **arguments)
    return stepper

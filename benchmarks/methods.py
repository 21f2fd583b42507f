"""The methods that a grid compares: functions ``(model, lr, seed, **arguments) -> stepper`` with ``step(closure)`` and ``forwards``."""

from __future__ import annotations

import copy
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.textbook import Textbook
from zolightning import DenseSpace, GaussianSampler, PolicySampler, TwoPoint, ZOOptimizer, samplers, spaces
from zolightning.policies import settled


class Stepper(Protocol):
    """What the grid needs of a method."""

    forwards: int

    def step(self, closure: Callable[[], Tensor]) -> Tensor: ...


def exact(model: nn.Module, lr: float, seed: int, eps: float = 1e-3, sampler: str = "GaussianSampler", queries: int = 1) -> ZOOptimizer:
    """Read-only probes and stochastic rounding, uniform scales."""
    return ZOOptimizer(DenseSpace(model), getattr(samplers, sampler)(), TwoPoint(queries), lr=lr, eps=eps, seed=seed)


def policy(model: nn.Module, lr: float, seed: int, policy: str, curvature: str, eps: float = 1e-3) -> ZOOptimizer:
    r"""Read-only probes with the scales of a policy, at a learning rate that means the same for all of them.

    One absolute rate cannot serve uniform and concentrated scales: the noise of a step grows with :math:`\eta \sum_i \sigma_i^2 F_i`. So
    ``lr`` is that product, in units in which uniform scales have :math:`\eta` itself. The probe distance is measured alike,
    :math:`\epsilon^2 \sum_i \sigma_i^2 F_i`. Scales that depend on the loss count as they are at a loss of 0.5.

    Args:
        model: The network.
        lr: Learning rate in those units.
        seed: Seed of the directions.
        policy: File of the policy.
        curvature: File with every block's share of the total curvature (``benchmarks.make_policies``).
        eps: Probe distance in those units.
    """
    sampler = PolicySampler(policy)
    optimizer = ZOOptimizer(DenseSpace(model), sampler, TwoPoint(), lr=lr, eps=eps, seed=seed)
    shares = json.loads(Path(curvature).read_text(encoding="utf-8"))
    typical = copy.deepcopy(sampler.features)
    typical.losses.fill_(0.5)
    factors = sampler.policy.normalise(settled(sampler.policy, typical)).square().tolist()
    cost = sum(factor * shares[block.name] for factor, block in zip(factors, optimizer.space.blocks, strict=True))
    optimizer.param_groups[0].update(lr=lr / cost, eps=eps / math.sqrt(cost))
    return optimizer


def space(
    model: nn.Module, lr: float, seed: int, space: str, eps: float = 1e-3, clip: float | None = None, **arguments: Any
) -> ZOOptimizer:
    """A space of :mod:`zolightning.spaces`, Gaussian directions, uniform scales.

    Args:
        model: The network.
        lr: Learning rate.
        seed: Seed of the directions.
        space: Name of its class.
        eps: Probe distance.
        clip: Limit of the directional derivative.
        **arguments: Of the space.
    """
    return ZOOptimizer(getattr(spaces, space)(model, **arguments), GaussianSampler(), TwoPoint(clip=clip), lr=lr, eps=eps, seed=seed)


class FirstOrder:
    """Adam with a backward pass: shows how much there is to learn. A step counts as two forwards, to take as many as the others.

    Args:
        model: The network; float32. Products take TF32 where the device has it: how much there is to learn needs no more.
        lr: Learning rate.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.forwards = 0

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step; returns the loss."""
        self.optimizer.zero_grad()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            loss = closure()
            loss.backward()
        finally:
            torch.set_float32_matmul_precision(before)
        self.optimizer.step()
        self.forwards += 2
        return loss.detach()


def adam(model: nn.Module, lr: float, seed: int) -> FirstOrder:
    """First-order Adam."""
    return FirstOrder(model, lr)


def textbook(model: nn.Module, lr: float, seed: int, eps: float = 1e-3) -> Textbook:
    """The in-place loop."""
    return Textbook(model, lr=lr, eps=eps, seed=seed)


def build(path: str, model: nn.Module, lr: float, seed: int, arguments: dict[str, Any]) -> Stepper:
    """Look a method up by ``module.function`` and call it."""
    module, _, name = path.rpartition(".")
    stepper: Stepper = getattr(importlib.import_module(module), name)(model, lr, seed, **arguments)
    return stepper

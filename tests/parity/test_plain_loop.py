"""Our step against a text-book loop that shares no code with it."""

from __future__ import annotations

import pytest
import reference
import torch
from nets import Net
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from zolightning.estimators import TwoPoint
from zolightning.optim import SGD, ZOOptimizer
from zolightning.samplers import GaussianSampler, RademacherSampler, Sampler
from zolightning.spaces import DenseSpace

STEPS = 50


@pytest.mark.parametrize(("sampler", "draw"), [(GaussianSampler, reference.gaussian), (RademacherSampler, reference.rademacher)])
@pytest.mark.parametrize(("queries", "weight_decay", "scheduled"), [(1, 0.0, False), (3, 0.1, True), (2, 0.0, True)])
def test_fifty_steps(sampler: type[Sampler], draw: reference.Draw, queries: int, weight_decay: float, scheduled: bool) -> None:
    """float64, to 1e-12, with noise drawn in numpy, several queries, weight decay and a schedule."""
    seed, lr, eps = (1 << 64) - 3, 2e-2, 1e-3
    model = Net(torch.float64).eval()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = torch.randn(STEPS, 6, 5, dtype=torch.float64), torch.randint(0, 3, (STEPS, 6))

    optimizer = ZOOptimizer(DenseSpace(model), sampler(), TwoPoint(queries), lr=lr, eps=eps, seed=seed, rule=SGD(weight_decay))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS if scheduled else 1.0)
    for step in range(STEPS):
        optimizer.step(lambda step=step: F.cross_entropy(model(x[step]), y[step]))  # type: ignore[misc]
        schedule.step()

    weights, plain = dict(start), Net(torch.float64).eval()
    for step in range(STEPS):

        def loss(parameters: dict[str, Tensor], step: int = step) -> Tensor:
            return F.cross_entropy(functional_call(plain, parameters, (x[step],)), y[step])

        rate = lr * (1 - step / STEPS) if scheduled else lr
        with torch.no_grad():
            weights = reference.plain_step(
                weights, loss, draw, seed=seed, step=step, queries=queries, lr=rate, eps=eps, weight_decay=weight_decay
            )

    moved = max(float((weights[name] - start[name]).abs().max()) for name in weights)
    apart = max(float((weights[name] - p).abs().max()) for name, p in model.named_parameters())
    assert moved > 0.05
    assert apart < 1e-12

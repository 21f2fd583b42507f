"""Meta-training against a plain autograd implementation, written from the equations alone: full-size noise, gradients through sigma.

Nothing of the code under test is used but the policy's initial numbers. The noise comes from tests/reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import VOCABULARY, tiny
from reference import gaussian
from torch import Tensor, nn
from torch.nn import functional as F

import zolightning as zl
from zolightning.modules.meta_objectives import AfterStep, ExpectedDecrease, MetaObjective, MetaPoint
from zolightning.modules.teacher import MomentumSGD, OneCopySGD, Teacher
from zolightning.policies import BlockInfo, Normaliser, PertNN

SEED, STEPS, EPS, LR, META_LR = 7, 3, 1e-3, 0.05, 0.3
Weights = dict[str, Tensor]


def llama(tied: bool) -> nn.Module:
    """A Llama whose norms compute in float64 too (transformers' own go through float32)."""
    model = tiny("llama", torch.float64, tied)

    def norm(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm(module)
    return model


def rows_of(step: int) -> Tensor:
    """Random prompts with the same answer, so that the rows' gradients agree."""
    ids = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(100 + step))
    ids[:, -3:] = torch.tensor([5, 9, 7])
    return ids


def loss_of(model: nn.Module, weights: Weights, ids: Tensor) -> Tensor:
    """Cross-entropy of the last three tokens, mean over all."""
    logits = torch.func.functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False}).logits
    return F.cross_entropy(logits[:, -4:-1].flatten(0, 1), ids[:, -3:].flatten())


class PlainPolicy:
    """Small networks, one per block, and the normalisation, as the paper writes them."""

    def __init__(self, parameters: dict[str, Tensor], weights: Weights, detached: bool, embedding: int | None) -> None:
        self.parameters = {name: p.detach().clone().double().requires_grad_() for name, p in parameters.items()}
        self.losses, self.sigma, self.detached = (0.0, 0.0), [1.0] * len(weights), detached
        self.sizes = [w.numel() if embedding is None or "embed" not in n else 15 * embedding * w.shape[1] for n, w in weights.items()]

    def scales(self, weights: Weights) -> tuple[Tensor, Tensor]:
        raw = []
        for i, w in enumerate(weights.values()):
            x = torch.stack([w.mean(), w.var(), *(torch.tensor(v, dtype=torch.float64) for v in (*self.losses, self.sigma[i]))]).detach()
            hidden = torch.tanh(self.parameters["weight_in"][i] @ x + self.parameters["bias_in"][i])
            raw.append((self.parameters["weight_out"][i] @ hidden + self.parameters["bias_out"][i]).abs())
        sigma = torch.stack(raw)
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        nu = (sizes.sum() / (sizes * sigma.square()).sum()).sqrt()
        return sigma, sigma * (nu.detach() if self.detached else nu)


def published(model: nn.Module, weights: Weights, scales: Tensor, step: int) -> tuple[Tensor, tuple[float, float]]:
    """The loss after one step of the two-point estimate; differentiable in the scales."""
    ids = rows_of(step)
    u = {
        name: scales[i] * torch.from_numpy(gaussian(SEED, name, step, 0, w.numel())).double().view_as(w)
        for i, (name, w) in enumerate(weights.items())
    }
    plus, minus = (float(loss_of(model, {n: w + e * u[n].detach() for n, w in weights.items()}, ids)) for e in (EPS, -EPS))
    coefficient = (plus - minus) / (2 * EPS)
    return loss_of(model, {name: w - LR * coefficient * u[name] for name, w in weights.items()}, ids), (plus, minus)


def expected(history: list[list[Weights]], names: list[str], scales: Tensor, lr: float | None, alignment: float = 0.1) -> Tensor:
    """From all rows' gradients of all steps so far: minus the logarithm of the best expected decrease; or of a given step size."""
    g, m, f = (torch.zeros(len(names), dtype=torch.float64) for _ in range(3))
    for rows in history:
        for i, name in enumerate(names):
            h = torch.stack([row[name].flatten() for row in rows])
            inner, count = h @ h.t(), len(rows)
            f[i] += inner.trace() / count / len(history)
            m[i] += inner.sum() / count**2 / len(history)
            g[i] += (inner.sum() - inner.trace()) / (count * (count - 1)) / len(history)
    s = scales.square()
    a, c = (s * g).sum(), (s * m).sum() * (s * f).sum() / 2 + alignment * (s * s * g.clamp_min(0) * f).sum()
    return -(a.square() / (4 * c)).log() if lr is None else -(lr * a - lr**2 * c) / g.sum()


def row_gradients(model: nn.Module, weights: Weights, ids: Tensor) -> list[Weights]:
    out = []
    for row in range(len(ids)):
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        loss = loss_of(model, leaves, ids[row : row + 1])
        out.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
    return out


def teach(model: nn.Module, weights: Weights, momentum: Weights, step: int, teacher: Teacher) -> Weights:
    """One step of the teacher: clipped by block, or as a whole with momentum."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    gradients = dict(zip(leaves, torch.autograd.grad(loss_of(model, leaves, rows_of(step)), list(leaves.values())), strict=True))
    lr = teacher.lr * (1 - step / teacher.reset_every)
    if isinstance(teacher, OneCopySGD):
        return {name: w - lr * gradients[name] * min(1.0, teacher.clip / float(gradients[name].norm())) for name, w in weights.items()}
    assert isinstance(teacher, MomentumSGD)
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    for name, gradient in gradients.items():
        momentum[name] = teacher.momentum * momentum.get(name, torch.zeros_like(gradient)) + gradient * min(1.0, teacher.clip / norm)
    return {name: w - lr * momentum[name] for name, w in weights.items()}


CASES: list[tuple[str, Callable[[], MetaObjective], Callable[[], Teacher]]] = [
    ("published", lambda: AfterStep(LR, EPS), lambda: MomentumSGD(lr=0.5, clip=0.3, reset_every=10)),
    ("published", lambda: AfterStep(LR, EPS), lambda: OneCopySGD(lr=0.5, clip=0.1, reset_every=10)),
    ("expected", lambda: ExpectedDecrease(warm_up=1, together=1), lambda: OneCopySGD(lr=0.5, clip=0.1, reset_every=10)),
    ("given rate", lambda: ExpectedDecrease(lr=0.02, warm_up=1, together=4), lambda: OneCopySGD(lr=0.5, clip=0.1, reset_every=10)),
    ("expected", lambda: ExpectedDecrease(warm_up=1, together=4), lambda: MomentumSGD(lr=0.5, clip=100.0, reset_every=10)),
]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("detached", "rule"), [(True, "published"), (False, "exact")])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "make_objective", "make_teacher"), CASES)
def test_meta_steps(
    kind: str,
    make_objective: Callable[[], MetaObjective],
    make_teacher: Callable[[], Teacher],
    tied: bool,
    detached: bool,
    rule: Any,
    checkpoint: bool,
) -> None:
    """Three steps: the policy's gradients, its parameters and the weights, to 1e-8."""
    model = llama(tied)
    space, objective, teacher = zl.DenseSpace(model), make_objective(), make_teacher()
    infos = [BlockInfo(block.name, tuple(block.tensor.shape)) for block in space.blocks]
    unbound = PertNN(hidden=8, normaliser=Normaliser(rule, 4, detached))
    sampler = zl.PolicySampler(unbound.bind(infos).double(), refresh_every=1)
    sampler.bind(space)
    policy = sampler.policy
    optimizer = torch.optim.SGD(policy.parameters(), lr=META_LR)

    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = PlainPolicy(dict(policy.named_parameters()), weights, detached, 4 if rule == "published" else None)
    momentum: Weights = {}
    history: list[list[Weights]] = []
    for step in range(STEPS):
        ids = rows_of(step)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "scored": torch.full((4,), 3)}
        sampler.refresh(step)
        raw = policy(sampler.features)
        scales = policy.normalise(raw)
        verdict = objective(MetaPoint(space, zl.TokenCrossEntropy(), batch, sampler, SEED, step, 0, checkpoint), scales.detach())
        optimizer.zero_grad()
        scales.backward(verdict.gradient)

        sigma, plain_scales = plain.scales(weights)
        if kind == "published":
            meta_loss, losses = published(model, weights, plain_scales, step)
        else:
            history.append(row_gradients(model, weights, ids))
            meta_loss = expected(history, list(weights), plain_scales, 0.02 if kind == "given rate" else None)
        gradients = dict(zip(plain.parameters, torch.autograd.grad(meta_loss, list(plain.parameters.values())), strict=True))
        torch.testing.assert_close(scales.detach(), plain_scales.detach(), rtol=1e-9, atol=1e-12)
        assert float(verdict.loss) == pytest.approx(float(meta_loss.detach()), abs=1e-9)
        for name, parameter in policy.named_parameters():
            scale = float(gradients[name].abs().max())
            assert scale > 0
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-8 * scale)

        optimizer.step()
        plain.parameters = {n: (p - META_LR * gradients[n]).detach().requires_grad_() for n, p in plain.parameters.items()}
        if kind == "published":
            sampler.features.observe(verdict.losses, raw.detach())
            plain.losses, plain.sigma = losses, sigma.tolist()
        teacher.step(space, zl.TokenCrossEntropy().on(model, batch), step, SEED, checkpoint)
        weights = teach(model, weights, momentum, step, teacher)
        for block in space.blocks:
            torch.testing.assert_close(block.tensor.detach(), weights[block.name], rtol=1e-9, atol=1e-12)

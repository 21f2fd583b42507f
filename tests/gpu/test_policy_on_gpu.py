"""Scales and observation inside a CUDA graph, and the same scales as on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zolightning.policies import FeaturePolicy, PertNN, Policy
from zolightning.samplers import PolicySampler
from zolightning.spaces import DenseSpace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def bound(policy: Policy, device: str) -> PolicySampler:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8)).to(device)
    sampler = PolicySampler(policy)
    sampler.bind(DenseSpace(model.eval()))
    return sampler


@pytest.mark.parametrize("policy", [PertNN(), FeaturePolicy(hidden=4)], ids=lambda policy: type(policy).__name__)
def test_a_captured_step_is_the_step(policy: Policy) -> None:
    captured, plain, cpu = bound(policy, "cuda"), bound(policy, "cuda"), bound(policy, "cpu")
    losses = torch.zeros(2, device="cuda")
    start = {name: tensor.clone() for name, tensor in captured.state().items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up
        captured.scales()
        captured.observe(losses)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scales = captured.scales()
        captured.observe(losses)
    for name, tensor in captured.state().items():
        tensor.copy_(start[name])
    for step, value in enumerate((0.5, 0.9, float("nan"), 2.0)):
        losses.fill_(value)
        for sampler in (captured, plain, cpu):
            sampler.refresh(step)
        graph.replay()
        expected, on_cpu = plain.scales(), cpu.scales()
        plain.observe(losses)
        cpu.observe(losses.cpu())
        assert torch.equal(scales, expected)
        assert torch.allclose(scales.cpu(), on_cpu, rtol=1e-4, atol=1e-5)
    for name, tensor in captured.state().items():
        assert torch.equal(tensor, plain.state()[name])

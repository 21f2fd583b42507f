"""The scales of a policy in a run: state, resume, skipped steps, what a CUDA graph can capture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, bits, net_closure, state_bits
from torch import Tensor, nn

from zolightning.estimators import TwoPoint
from zolightning.noise import GaussianNoise, Key, RademacherNoise
from zolightning.policies import BlockInfo, FeaturePolicy, Features, Normaliser, PertNN, Policy, Table, Uniform, controls
from zolightning.samplers import GaussianSampler, PolicySampler, RademacherSampler, Sampler
from zolightning.spaces import DenseSpace
from zolightning.testing import DeviceOnly, check_sampler

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("base", [None, RademacherSampler()], ids=["gaussian", "rademacher"])
@pytest.mark.parametrize("policy", [Uniform(), PertNN(), FeaturePolicy(hidden=3)], ids=lambda policy: type(policy).__name__)
def test_common(policy: Policy, base: Sampler | None) -> None:
    check_sampler(PolicySampler(policy, base))


class Run:
    """The steps of an optimizer that calls a sampler's hooks."""

    def __init__(self, sampler: Sampler, dtype: torch.dtype = torch.float32, queries: int = 1) -> None:
        self.model = Net(dtype).eval()
        self.space, self.sampler, self.estimator = DenseSpace(self.model), sampler, TwoPoint(queries)
        sampler.bind(self.space)
        self.scales: list[Tensor] = []

    @torch.no_grad()
    def steps(self, first: int, last: int, bad: int = -1) -> None:
        for step in range(first, last):
            self.sampler.refresh(step)
            directions = self.sampler.directions(7, step, self.estimator.queries)
            losses = []
            for probe in self.estimator.probes:
                with self.space.probe(directions[probe.query], probe.sign * 0.1):
                    losses.append(net_closure(self.model, step)() * (float("nan") if step == bad else 1.0))
            found = torch.stack(losses)
            self.space.move(directions, -0.02 * self.estimator.coefficients(found, 0.1), 0.0, torch.isfinite(found).all())
            self.sampler.observe(found)
            self.scales.append(directions[0].scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", [PertNN(), FeaturePolicy(hidden=3)], ids=lambda policy: type(policy).__name__)
def test_ten_steps_are_five_and_five(policy: Policy, dtype: torch.dtype) -> None:
    """A fresh sampler that gets the state back continues to the same bits; the statistics are of step 4, between two checkpoints."""
    policy = policy.bind([BlockInfo(block.name, tuple(block.tensor.shape)) for block in DenseSpace(Net()).blocks])
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    whole = Run(PolicySampler(policy, refresh_every=4), dtype, queries=2)
    whole.steps(0, 10, bad=3)
    half = Run(PolicySampler(policy, refresh_every=4), dtype, queries=2)
    half.steps(0, 5, bad=3)
    saved = {name: tensor.clone() for name, tensor in half.sampler.state().items()}
    rest = Run(PolicySampler(policy, refresh_every=4), dtype, queries=2)
    rest.model.load_state_dict(half.model.state_dict())
    for name, tensor in rest.sampler.state().items():
        tensor.copy_(saved[name])
    rest.steps(5, 10)
    assert state_bits(rest.model) == state_bits(whole.model)
    assert [bits(scale) for scale in half.scales + rest.scales] == [bits(scale) for scale in whole.scales]
    assert len({bits(scale) for scale in whole.scales}) > 5, "the scales follow the losses"


def test_state_is_what_the_paper_feeds_back() -> None:
    run = Run(PolicySampler(PertNN()), queries=1)
    sampler = run.sampler
    assert isinstance(sampler, PolicySampler)
    first = {name: tensor.clone() for name, tensor in sampler.state().items()}
    assert first["sigma"].tolist() == [1] * 7
    assert first["losses"].tolist() == [0, 0]
    raw = sampler.policy(sampler.features).detach().clone()
    live = sampler.state()
    run.steps(0, 1)
    assert torch.equal(live["sigma"], raw), "the raw scales of the step, not the normalised ones"
    assert float(live["losses"].min()) > 0
    assert live["losses"][0] != live["losses"][1]
    assert all(live[name] is sampler.state()[name] for name in live), "written in place"
    expected = [block.tensor.float().mean() for block in DenseSpace(Net()).blocks]
    assert torch.allclose(live["mean"], torch.stack(expected), atol=1e-6)


def test_a_bad_step_leaves_no_trace() -> None:
    run = Run(PolicySampler(PertNN()))
    run.steps(0, 2)
    before = {name: bits(tensor) for name, tensor in run.sampler.state().items()}
    run.steps(2, 3, bad=2)
    assert {name: bits(tensor) for name, tensor in run.sampler.state().items()} == before


@pytest.mark.parametrize(("every", "changes"), [(1, 5), (2, 3), (200, 1)])
def test_statistics_are_taken_now_and_then(every: int, changes: int) -> None:
    run = Run(PolicySampler(PertNN(), refresh_every=every))
    seen = set()
    for step in range(5):
        run.steps(step, step + 1)
        seen.add(bits(run.sampler.state()["mean"]))
    assert len(seen) == changes


@pytest.mark.parametrize(
    "policy", [Uniform(), PertNN(), FeaturePolicy(), FeaturePolicy(hidden=3)], ids=lambda policy: type(policy).__name__
)
def test_a_step_can_be_captured(policy: Policy) -> None:
    """Scales and observation read no value on the host and make no tensor there."""
    run = Run(PolicySampler(policy))
    with DeviceOnly():
        run.sampler.scales()
        run.sampler.observe(torch.ones(4))
    with DeviceOnly(), pytest.raises(AssertionError, match="waits for the host"):
        run.sampler.scales().sum().item()


def test_noise_is_that_of_the_base_sampler() -> None:
    key = Key(1, 2, 3, 4)
    run = Run(PolicySampler(Uniform(), RademacherSampler()))
    block = run.space.blocks[0]
    assert run.sampler.noise(block, key) == RademacherNoise(key)
    assert Run(PolicySampler(Uniform())).sampler.noise(block, key) == GaussianNoise(key)


class Counting(GaussianSampler):
    """A base sampler with a state of its own."""

    second_moment = 1.0

    def bind(self, space: Any) -> None:
        super().bind(space)
        self.count = torch.zeros(())

    def observe(self, losses: Tensor) -> None:
        self.count += 1

    def refresh(self, step: int) -> None:
        self.step = step

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count}


def test_a_base_sampler_keeps_its_own_state() -> None:
    base = Counting()
    run = Run(PolicySampler(Uniform(), base))
    run.steps(0, 3)
    assert base.step == 2
    assert run.sampler.state()["base.count"] is base.count
    assert float(base.count) == 3


def test_uniform_policy_is_the_base_sampler() -> None:
    runs = [Run(sampler) for sampler in (GaussianSampler(), PolicySampler(Uniform()))]
    for run in runs:
        run.steps(0, 3)
    assert state_bits(runs[0].model) == state_bits(runs[1].model)


def test_scales_of_zero_freeze() -> None:
    space = DenseSpace(Net())
    infos = [BlockInfo(block.name, tuple(block.tensor.shape)) for block in space.blocks]
    run = Run(PolicySampler(Table.of(infos, torch.tensor([0.0, 1, 1, 1, 1, 1, 1]))))
    run.steps(0, 2)
    names = [block.name for block in run.space.blocks]
    moved = {name for name, value in state_bits(run.model).items() if value != state_bits(Net())[name]}
    assert moved == set(names[1:])


def test_a_file(tmp_path: Path) -> None:
    infos = [BlockInfo(block.name, tuple(block.tensor.shape)) for block in DenseSpace(Net()).blocks]
    path = PertNN(hidden=4).bind(infos).save_pretrained(tmp_path / "p.safetensors")
    a, b = (Run(PolicySampler(policy)) for policy in (str(path), PertNN(hidden=4)))
    for run in (a, b):
        run.steps(0, 2)
    assert state_bits(a.model) == state_bits(b.model)


def test_a_policy_for_another_model() -> None:
    sampler = PolicySampler(PertNN().bind([BlockInfo("layers.0.up_proj.weight", (2, 2))]))
    with pytest.raises(
        ValueError, match=r"the policy is for other blocks \(7 missing from the policy: 'scale', 'first.weight', 'first.bias', ..."
    ):
        sampler.bind(DenseSpace(Net()))


def test_a_derived_model_of_other_size_by_kind() -> None:
    class Stack(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(2, 2, bias=False)}) for _ in range(layers))

    def infos(model: nn.Module) -> list[BlockInfo]:
        return [BlockInfo(name, tuple(p.shape)) for name, p in model.named_parameters()]

    policy = Table.of(infos(Stack(5)), torch.arange(1.0, 6.0), Normaliser("none"))
    sampler = PolicySampler(policy, match="kind")
    sampler.bind(DenseSpace(Stack(3)))
    assert sampler.scales().tolist() == [1, 3, 5]


class Broken(Uniform):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, features: Features) -> Tensor:
        return super().forward(features) * self.value


def test_refusals() -> None:
    with pytest.raises(ValueError, match="refresh_every=0 must be at least 1"):
        PolicySampler(Uniform(), refresh_every=0)
    with pytest.raises(ValueError, match="match='names' must be 'exact' or 'kind'"):
        PolicySampler(Uniform(), match="names")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="policy 'missing' is neither a file nor a shipped policy"):
        PolicySampler("missing")
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the policy gives no usable scales"):
            Run(PolicySampler(Broken(value)))


def test_untrained_control_in_float64() -> None:
    """The state of a float64 model is float64, the scales float32."""
    run = Run(PolicySampler(controls.untrained()), torch.float64)
    run.steps(0, 2)
    assert {tensor.dtype for tensor in run.sampler.state().values()} == {torch.float64}
    assert run.sampler.scales().dtype == torch.float32

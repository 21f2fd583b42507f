"""Every policy passes the common test; each computes what its page says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zolightning.policies import BlockInfo, FeaturePolicy, Features, LossTable, Normaliser, PertNN, Policy, Table, Uniform, controls
from zolightning.testing import check_policy

BLOCKS = [
    BlockInfo("model.embed_tokens.weight", (40, 8)), BlockInfo("model.layers.0.mlp.up_proj.weight", (16, 8)),
    BlockInfo("model.layers.1.mlp.up_proj.weight", (16, 8)), BlockInfo("model.norm.weight", (8,)),
]  # fmt: skip


def stirred(policy: Policy) -> Policy:
    """A bound policy with parameters away from their initial values."""
    bound = policy.bind(BLOCKS)
    generator = torch.Generator().manual_seed(0)
    for parameter in bound.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return bound


ALL = [
    Uniform(), Table(), PertNN(), PertNN(hidden=3, seed=7, normaliser=Normaliser("published")), FeaturePolicy(), FeaturePolicy(hidden=8),
    FeaturePolicy(hidden=2, offset=False, normaliser=Normaliser("none")), stirred(Table()), stirred(PertNN()), stirred(FeaturePolicy(4)),
    controls.upper_half(BLOCKS), controls.untrained(), controls.uniform(), LossTable(), LossTable([0.5]),
    stirred(LossTable([0.3, 0.9, 2.0])),
    LossTable.of(BLOCKS, [0.8, 1.2], torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 0.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0, 3.0, 0.0])),
]  # fmt: skip


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: type(policy).__name__)
def test_common(policy: Policy) -> None:
    check_policy(policy)


class Reads(Uniform):
    def forward(self, features: Features) -> Tensor:
        return super().forward(features) * (1.0 if features.losses[0] > 0 else 2.0)


class MakesTensors(Uniform):
    def forward(self, features: Features) -> Tensor:
        return torch.tensor([1.0 for _ in features.blocks])


class Writes(Uniform):
    def forward(self, features: Features) -> Tensor:
        features.sigma.mul_(0.5)
        return super().forward(features)


class Negative(Uniform):
    def forward(self, features: Features) -> Tensor:
        return -super().forward(features)


class Nothing(Uniform):
    def forward(self, features: Features) -> Tensor:
        return super().forward(features) * 0


class Short(Uniform):
    def forward(self, features: Features) -> Tensor:
        return super().forward(features)[:1]


class Rearranged(Table):
    per_block = ()

    def initial(self) -> dict[str, Tensor]:
        return {"values": torch.arange(1.0, 1.0 + len(self.blocks))}

    def bind(self, blocks: Any, match: Any = "exact") -> Any:
        other = super().bind(blocks, match)
        if self.blocks and other is not self:
            other.values = nn.Parameter(self.values.detach().clone())
        return other


class Stuck(Table):
    def forward(self, features: Features) -> Tensor:
        return torch.ones_like(self.values) + 0 * self.values.detach() + 0 * features.mean.requires_grad_()


class Forgetful(Uniform):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = 2 * factor

    def forward(self, features: Features) -> Tensor:
        return super().forward(features) * self.factor


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (Reads(), "_local_scalar_dense waits for the host"),
        (MakesTensors(), "lift_fresh waits for the host"),
        (Writes(), r"forward\(\) changed sigma"),
        (Negative(), "finite and not negative"),
        (Nothing(), "is every raw scale 0"),
        (Rearranged(), "another order of the blocks"),
        (Stuck(), "the scales do not depend on values"),
        (Forgetful(), "another configuration"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_common_test_finds_mistakes(policy: Policy, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_policy(policy)


def test_common_test_finds_a_wrong_shape() -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_policy(Short())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_networks_are_networks(dtype: torch.dtype) -> None:
    """One batched call gives what plain torch modules give, block by block, and so do its gradients."""
    policy = stirred(PertNN()).to(dtype)
    features = Features(BLOCKS, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for tensor in features.state().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    weights = torch.rand(len(BLOCKS), generator=generator).to(dtype)
    raw = policy(features)
    (raw * weights).sum().backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for i in range(len(BLOCKS)):
        net = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
        values = (policy.weight_in[i], policy.bias_in[i], policy.weight_out[i][None], policy.bias_out[i][None])
        for parameter, value in zip(net.parameters(), values, strict=True):
            parameter.data.copy_(value)
        x = torch.stack([features.mean[i], features.variance[i], *features.losses, features.sigma[i]])
        expected = net(x).abs().squeeze()
        assert torch.allclose(raw[i], expected, atol=tolerance)
        (expected * weights[i]).backward()
        for parameter, name in zip(net.parameters(), policy.per_block, strict=True):
            assert torch.allclose(parameter.grad.flatten(), getattr(policy, name).grad[i].flatten(), atol=tolerance)  # type: ignore[union-attr]


def test_untrained_networks_have_torch_bounds_and_a_seed() -> None:
    policy, same, other = (PertNN(seed=seed).bind(BLOCKS) for seed in (42, 42, 43))
    assert policy.n_params == 449 * len(BLOCKS)
    for name, bound in zip(policy.per_block, (5**-0.5, 5**-0.5, 64**-0.5, 64**-0.5), strict=True):
        values = getattr(policy, name).detach()
        assert float(values.abs().max()) <= bound
        assert values.numel() < 100 or float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert torch.equal(values, getattr(same, name))
        assert not torch.equal(values, getattr(other, name))


def test_feature_policy_starts_uniform_and_shares_its_function() -> None:
    for policy in (FeaturePolicy(), FeaturePolicy(hidden=8)):
        assert torch.equal(policy.bind(BLOCKS)(Features.reference(BLOCKS)), torch.ones(4))
    policy = stirred(FeaturePolicy(hidden=4, offset=False))
    wanted = [BlockInfo("h.0.mlp.fc1.weight", (16, 8))]
    other = policy.bind(wanted, "kind")
    assert torch.allclose(other(Features.reference(wanted))[0], policy(Features.reference(BLOCKS))[1])


def test_feature_policy_offset_scales_one_block() -> None:
    policy = FeaturePolicy().bind(BLOCKS)
    policy.offsets.data[2] = 2.0
    assert policy(Features.reference(BLOCKS)).log().tolist() == pytest.approx([0, 0, 2, 0])


def test_bind_leaves_the_original_alone() -> None:
    policy = stirred(Table())
    other = policy.bind(BLOCKS[::-1])
    assert torch.equal(other.values.flip(0), policy.values)
    other.values.data.zero_()
    assert not bool((policy.values == 0).any())
    assert policy.bind(BLOCKS) is policy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PertNN(hidden=0), "hidden=0 must be an integer between 1 and 65536"),
        (lambda: PertNN(seed=-1), r"seed=-1 must be between 0 and 2\*\*64 - 1"),
        (lambda: FeaturePolicy(hidden=-1), "hidden=-1 must be an integer between 0 and 4096"),
        (lambda: FeaturePolicy(offset=1), "offset=1 must be true or false"),  # type: ignore[arg-type]
        (lambda: FeaturePolicy(seed="a"), "seed='a' must be between"),  # type: ignore[arg-type]
        (lambda: Table.of(BLOCKS, torch.ones(3)), r"scales have shape \(3,\) for 4 blocks"),
        (lambda: Table.of(BLOCKS, torch.tensor([1.0, 1.0, 1.0, -1.0])), "scales must be finite and not negative"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_two_classes_of_one_name() -> None:
    with pytest.raises(TypeError, match="there is a policy class Table already"):
        type("Table", (Uniform,), {})


@pytest.mark.parametrize(
    ("loss", "shares"),
    [(0.1, [1, 0, 0]), (0.5, [1, 0, 0]), (0.75, [0.5, 0.5, 0]), (1.0, [0, 1, 0]), (1.6, [0, 0.7, 0.3]), (9.0, [0, 0, 1]), (0.0, [0, 0, 1])],
)
def test_loss_table(loss: float, shares: list[float]) -> None:
    """Squares are interpolated; the nearest level counts outside, the highest where no loss is known; the curvature stays."""
    scales = torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 1.0], [2.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    curvature = torch.tensor([1.0, 5.0, 2.0, 0.5])
    table = LossTable.of(BLOCKS, [0.5, 1.0, 3.0], scales, curvature)
    found = table.normalise(table(Features.reference(BLOCKS, loss))).square().detach()
    units = scales.square() / (scales.square() * curvature[:, None]).sum(0) * curvature.sum()
    assert torch.allclose(found, units @ torch.tensor(shares, dtype=torch.float32), atol=1e-6)
    assert float((found * curvature).sum()) == pytest.approx(float(curvature.sum()), rel=1e-6)


def test_loss_table_learns() -> None:
    """Gradients are finite where a scale is zero; a block that has one in no level never moves."""
    table = LossTable.of(BLOCKS, [0.5, 1.0], torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.ones(4))
    raw = table(Features.reference(BLOCKS, 0.75))
    raw.sum().backward()
    assert raw[0] == 0
    assert bool(table.values.grad.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), r"levels=\[\] must be positive and finite, at least one"),
        (([0.0, 1.0],), r"levels=\[0.0, 1.0\] must be positive"),
        (([1.0, float("inf")],), "positive and finite"),
        (([2.0, 1.0],), r"levels=\[2.0, 1.0\] must ascend"),
        (([1.0, 1.0],), "must ascend"),
        (([1.0], torch.ones(4, 2), torch.ones(4)), r"shapes \(4, 2\) and \(4,\) for 4 blocks and 1 levels"),
        (([1.0], torch.ones(4, 1), torch.ones(3)), r"shapes \(4, 1\) and \(3,\)"),
        (([1.0], -torch.ones(4, 1), torch.ones(4)), "scales must be finite and not negative"),
        (([1.0], torch.ones(4, 1), torch.full((4,), float("nan"))), "curvature must be finite"),
        (([1.0, 2.0], torch.tensor([[1.0, 0.0]] * 4), torch.ones(4)), r"levels \[2.0\] move nothing that has curvature"),
    ],
)
def test_loss_table_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossTable(*arguments) if len(arguments) == 1 else LossTable.of(BLOCKS, *arguments)

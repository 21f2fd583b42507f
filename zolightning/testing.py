"""The common tests of every extension: run them over a class of your own.

Each function takes a finished object, asserts what the rest of the package relies on, and returns nothing. Nothing random outside
the package's own noise is used, so a failure repeats.

Example:
    >>> from zolightning.testing import check_sampler
    >>> check_sampler(GaussianSampler())
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zolightning.estimators.base import Estimator
from zolightning.estimators.two_point import TwoPoint
from zolightning.noise import Key
from zolightning.optim.rules import Rule
from zolightning.policies import BlockInfo, Features, Policy
from zolightning.samplers.base import Direction, Sampler
from zolightning.samplers.gaussian import GaussianSampler
from zolightning.spaces.base import Space
from zolightning.spaces.dense import DenseSpace

__all__ = ["DeviceOnly", "check_estimator", "check_policy", "check_rule", "check_sampler", "check_space"]

_CPU = torch.device("cpu")
_STANDARD_ERRORS = 5.0


class _Quadratic(nn.Module):
    r"""The loss :math:`\frac12 \theta^\top A \theta + b^\top \theta` of three blocks, 29 elements in all."""

    a: Tensor
    b: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 5, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
        self.scale = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=torch.float64))
        root = torch.randn(29, 29, generator=generator, dtype=torch.float64) / 5
        self.register_buffer("a", root @ root.T)
        self.register_buffer("b", torch.randn(29, generator=generator, dtype=torch.float64))

    def theta(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])

    def loss(self, theta: Tensor) -> Tensor:
        """Loss of each row of ``theta``."""
        return 0.5 * ((theta @ self.a) * theta).sum(-1) + theta @ self.b

    def gradient(self) -> Tensor:
        return self.a @ self.theta() + self.b


def check_sampler(sampler: Sampler, draws: int = 1200) -> None:
    r"""Noise is a pure function of its key, has the declared second moment, and gives :math:`E[\hat g] = m \Sigma^2 g`.

    The last is measured with central differences on a quadratic. The sampler is left bound to the test's own small space.

    Args:
        sampler: Any sampler whose scales do not change from step to step.
        draws: Directions to average over; the tolerance is 5 standard errors.

    Raises:
        AssertionError: A property does not hold.
    """
    model = _Quadratic()
    space = DenseSpace(model)
    sampler.bind(space)
    scales = sampler.scales()
    assert scales.shape == (len(space.blocks),), f"scales() has shape {tuple(scales.shape)} for {len(space.blocks)} blocks"
    assert scales.dtype == torch.float32, f"scales() is {scales.dtype}, expected float32"
    assert bool((torch.isfinite(scales) & (scales >= 0)).all()), f"scales() must be finite and not negative, got {scales}"
    _check_purity(sampler, space)

    directions = [sampler.directions(seed=0, step=step, queries=1)[0] for step in range(draws)]
    z = torch.stack([torch.cat([d.noise(block).draw(0, block.numel, _CPU) for block in space.blocks]) for d in directions]).double()
    _check_mean(z, torch.zeros(space.numel, dtype=torch.float64), "the mean of z")
    products = torch.einsum("ni,nj->nij", z, z).flatten(1)
    identity = torch.eye(space.numel, dtype=torch.float64).flatten()
    _check_mean(products, sampler.second_moment * identity, f"E[z z^T], declared as {sampler.second_moment} I,")

    sigma = torch.cat([scale.double().expand(block.numel) for scale, block in zip(scales, space.blocks, strict=True)])
    u, eps = z * sigma, 1e-3
    losses = torch.stack([model.loss(model.theta() + eps * u), model.loss(model.theta() - eps * u)])
    estimates = TwoPoint().coefficients(losses, eps)[0][:, None] * u
    _check_mean(estimates, sampler.second_moment * sigma**2 * model.gradient(), "the mean of the gradient estimate")


def _check_purity(sampler: Sampler, space: Space) -> None:
    """Same key, same bits, in any pieces; another key, other bits; no global random state."""
    block, other = space.blocks[:2]
    key, numel = Key(seed=5, block=block.id, step=3, query=1), 700
    states = torch.get_rng_state()
    whole = sampler.noise(block, key).draw(0, numel, _CPU)
    assert torch.equal(torch.get_rng_state(), states), "drawing noise changed torch's global random state"
    assert whole.dtype == torch.float32, f"noise is {whole.dtype}, expected float32"
    assert whole.shape == (numel,), f"draw(0, {numel}) has shape {tuple(whole.shape)}"
    assert torch.equal(sampler.noise(block, key).draw(0, numel, _CPU), whole), "the same key gave different noise"
    for start, stop in ((0, 1), (1, 4), (3, 131), (127, 129), (130, numel)):
        piece = sampler.noise(block, key).draw(start, stop - start, _CPU)
        assert torch.equal(piece, whole[start:stop]), f"elements {start} to {stop} drawn alone differ from the whole"
    changed = [Key(6, block.id, 3, 1), Key(5, block.id, 4, 1), Key(5, block.id, 3, 2)]
    for what, renewed in zip(("seed", "step", "query"), changed, strict=True):
        assert not torch.equal(sampler.noise(block, renewed).draw(0, numel, _CPU), whole), f"another {what} gave the same noise"
    stranger = sampler.noise(other, Key(5, other.id, 3, 1)).draw(0, numel, _CPU)
    assert not torch.equal(stranger, whole), "two blocks got the same noise"
    first, second = sampler.directions(seed=5, step=3, queries=2)
    assert (first.query, second.query) == (0, 1), "directions() must number the queries from 0"
    assert torch.equal(second.noise(block).draw(0, numel, _CPU), whole), "directions() and noise() disagree"


def _check_mean(samples: Tensor, expected: Tensor, what: str) -> None:
    """The mean over the rows is the expected vector to 5 standard errors, element by element."""
    error = samples.std(0) / len(samples) ** 0.5
    worst = ((samples.mean(0) - expected).abs() / (error * _STANDARD_ERRORS + 1e-6)).max()
    assert float(worst) <= 1.0, f"{what} is off by {float(worst) * _STANDARD_ERRORS:.1f} standard errors"


def check_space(space: Space, closure: Callable[[], Any], eps: float = 1e-2, sampler: Sampler | None = None) -> None:
    """Probes are real, repeatable and read-only; an update moves every block; errors inside a probe leave no trace.

    The weights are put back at the end.

    Args:
        space: Any space.
        closure: Evaluates the loss of one fixed batch with the space's model.
        eps: Probe distance, large enough to be seen in the loss.
        sampler: Distribution of the directions; ``None``: Gaussian.

    Raises:
        AssertionError: A property does not hold.
    """
    sampler = sampler if sampler is not None else GaussianSampler()
    sampler.bind(space)
    direction, second = sampler.directions(seed=1, step=2, queries=2)
    with torch.no_grad():
        before = _State(space)
        report = space.verify(lambda: torch.as_tensor(closure()), direction, eps)
        before.check("the set-up probe")
        _check_probes(space, closure, direction, second, eps, before)
        _check_errors(space, closure, direction, eps, before)
        for index, block in enumerate(space.blocks):
            seen = _responds(space, closure, direction, index, eps)
            assert seen != (block.name in report.unread), (
                f"{block.name}: {'read' if seen else 'not perturbed'}, but the report says otherwise"
            )
        before.check("probing block by block")
        _check_move(space, direction, before)
    _check_turns(space)


def _check_turns(space: Space) -> None:
    """Which blocks move follows from the step, without a look at the device, and some do."""
    for step in (0, 1, 1000):
        clock = torch.tensor(step, device=space.device)
        with DeviceOnly():
            active, again = space.active(clock), space.active(clock)
        if active is None or again is None:
            assert active is again is None, f"active() is not a function of the step: {active} and {again} for step {step}"
            continue
        assert (active.shape, active.dtype) == ((len(space.blocks),), torch.float32), (
            f"active() gives {active.dtype}{list(active.shape)} for {len(space.blocks)} blocks"
        )
        assert torch.equal(active, again), f"active() gives two answers for step {step}"
        assert set(active.tolist()) in ({1.0}, {0.0, 1.0}), f"active() must be 0 or 1, and 1 somewhere: {active}"


class _State:
    """The bits, identities and hooks of a model before a test."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.tensors = dict(self._named())
        self.values = {name: t.detach().clone() for name, t in self.tensors.items()}
        self.hooks = self._hooks()

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.space.model.named_parameters(remove_duplicate=False)
        yield from self.space.model.named_buffers(remove_duplicate=False)
        yield from ((block.name, block.tensor) for block in self.space.blocks)

    def _hooks(self) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.space.model.modules())

    def check(self, after: str) -> None:
        for name, tensor in self._named():
            assert tensor is self.tensors[name], f"{name} is another tensor after {after}"
            assert torch.equal(_raw(tensor), _raw(self.values[name])), f"{name} changed in {after}"
        assert self._hooks() == self.hooks, f"hooks are left after {after}"

    def restore(self) -> None:
        for name, tensor in self._named():
            tensor.copy_(self.values[name])


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _check_probes(space: Space, closure: Callable[[], Any], direction: Direction, second: Direction, eps: float, before: _State) -> None:
    def loss(along: Direction, distance: float) -> float:
        with space.probe(along, distance):
            return float(closure())

    plain = float(closure())
    plus, minus, other = loss(direction, eps), loss(direction, -eps), loss(second, eps)
    assert plus == loss(direction, eps), "two probes of one direction gave different losses"
    assert len({plain, plus, minus, other}) == 4, "the loss does not respond to the sign, the direction or the probe at all"
    still = loss(direction, 0.0)
    assert abs(still - plain) <= 1e-2 * abs(plus - minus) + 1e-6 * abs(plain), f"a probe at distance 0 has loss {still}, not {plain}"
    assert float(closure()) == plain, "the loss without a probe changed"
    before.check("probing")


def _check_errors(space: Space, closure: Callable[[], Any], direction: Direction, eps: float, before: _State) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    for error in (ArithmeticError("inside a forward"), KeyboardInterrupt()):
        for module in space.model.modules():
            handle = module.register_forward_hook(fail)
            try:
                with space.probe(direction, eps):
                    closure()
            except type(error):
                pass
            finally:
                handle.remove()
            before.check(f"{type(error).__name__} inside a probe")


def _responds(space: Space, closure: Callable[[], Any], direction: Direction, index: int, eps: float) -> bool:
    """Whether the loss, or else what some module computes, changes if this block alone is perturbed.

    The loss alone would not do: the softmax of attention hides a bias of the keys.
    """
    scales = torch.zeros_like(direction.scales)
    scales[index] = 1.0
    alone = Direction(direction.sampler, direction.seed, direction.step, direction.query, scales)
    seen = []
    for distance in (0.0, eps):
        with space.probe(alone, distance), _outputs(space.model) as outputs:
            outputs.append(torch.as_tensor(closure()).double().cpu())
        seen.append(outputs)
    return any(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the floating-point outputs of every module."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.extend(t.detach().double().cpu() for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())

    handles = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_move(space: Space, direction: Direction, before: _State) -> None:
    yes, no = (torch.tensor(value, device=space.device) for value in (True, False))
    amount = torch.full((1,), 0.1, dtype=space.compute_dtype, device=space.device)
    space.move([direction], amount * float("nan"), 0.5, no)
    before.check("an update that is not valid")
    try:
        space.move([direction], amount, 1.0, yes)
        once = [block.tensor.clone() for block in space.blocks]
        for block in space.blocks:
            assert bool(torch.isfinite(block.tensor).all()), f"{block.name} is not finite after an update"
            assert not torch.equal(block.tensor, before.values[block.name]), f"{block.name} did not move in an update"
        before.restore()
        space.move([direction], amount, 1.0, yes)
        for block, tensor in zip(space.blocks, once, strict=True):
            assert torch.equal(block.tensor, tensor), f"{block.name}: the same update gave other bits"
    finally:
        before.restore()


def check_estimator(estimator: Estimator) -> None:
    r"""Coefficients are the slopes along the directions, averaged: :math:`c_q = g \cdot u_q / Q` on a linear loss.

    Args:
        estimator: Any estimator that has one coefficient per direction.

    Raises:
        AssertionError: A property does not hold.
    """
    probes, queries = estimator.probes, estimator.queries
    assert {probe.query for probe in probes} >= set(range(queries)), "a direction is never probed"
    assert all(0 <= probe.query < queries and probe.sign in (-1, 0, 1) for probe in probes), f"a probe is out of range: {probes}"
    slopes = torch.linspace(-2.0, 3.0, queries, dtype=torch.float64)
    query = torch.tensor([probe.query for probe in probes])
    sign = torch.tensor([probe.sign for probe in probes], dtype=torch.float64)
    for eps in (1e-3, 0.5):
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-2 if eps < 0.1 else 1e-5)):
            losses = (1.5 + sign * eps * slopes[query]).to(dtype)
            kept = losses.clone()
            found = estimator.coefficients(losses, eps)
            assert torch.equal(losses, kept), "coefficients() changed its input"
            assert found.shape == (queries,), f"coefficients have shape {tuple(found.shape)} for {queries} queries"
            assert found.dtype == dtype, f"coefficients are {found.dtype} for {dtype} losses"
            worst = float((found.double() - slopes / queries).abs().max())
            assert worst <= tolerance, f"on a linear loss the coefficients are off by {worst:g} at eps={eps:g}"
    flat = estimator.coefficients(torch.full((len(probes),), 1.5), 1e-3)
    assert bool((flat == 0).all()), f"a constant loss has coefficients {flat.tolist()}"
    broken = torch.full((len(probes),), 1.5)
    broken[-1] = float("nan")
    assert bool(estimator.coefficients(broken, 1e-3).isnan().any()), "a loss that is not a number is hidden"


def check_rule(rule: Rule) -> None:
    """A fresh rule steps down the estimate, stands still without one, and shrinks the weights at most.

    Args:
        rule: A rule that has not stepped yet.

    Raises:
        AssertionError: A property does not hold.
    """
    still = rule.move(torch.zeros(3), torch.tensor(0.1))
    assert bool((still.weights == 0).all()), f"zero coefficients move the weights by {still.weights.tolist()}"
    for dtype in (torch.float32, torch.float64):
        coefficients = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
        kept = coefficients.clone()
        weights, shrink = rule.move(coefficients, torch.tensor(0.1, dtype=dtype))
        assert torch.equal(coefficients, kept), "move() changed its input"
        assert weights.shape == (3,), f"weights have shape {tuple(weights.shape)} for 3 directions"
        assert weights.dtype == dtype, f"weights are {weights.dtype} for {dtype} coefficients"
        assert bool(torch.isfinite(weights).all()), f"weights are not finite: {weights.tolist()}"
        assert float((weights * coefficients).sum()) < 0, "the step does not go down the estimate"
        assert 0 <= shrink < 1, f"shrink={shrink} must be at least 0 and below 1"


class DeviceOnly(TorchDispatchMode):
    """Context that refuses what a CUDA graph cannot capture: values read by the host, tensors made from Python lists.

    Raises:
        AssertionError: Such an operation ran.

    Example:
        >>> with DeviceOnly():
        ...     sampler.scales()
    """

    _refused = frozenset({"_local_scalar_dense", "equal", "nonzero", "lift_fresh", "_unique2"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, or refuse it."""
        name = func.overloadpacket.__name__
        assert name not in self._refused, f"{name} waits for the host; a captured step can only use operations of the device"
        return func(*args, **(kwargs or {}))


_BLOCKS = (
    BlockInfo("embed_tokens.weight", (64, 8)),
    *(
        BlockInfo(f"layers.{layer}.{name}.weight", shape)
        for layer in range(3)
        for name, shape in (("self_attn.q_proj", (8, 8)), ("mlp.down_proj", (8, 16)), ("input_layernorm", (8,)))
    ),
    BlockInfo("norm.weight", (8,)),
)


def check_policy(policy: Policy) -> None:
    """Scales are usable, a pure function on the device, differentiable, and survive another order of the blocks and a file.

    Args:
        policy: Any policy; a fresh one is bound to the test's own small model.

    Raises:
        AssertionError: A property does not hold.
    """
    fresh = not policy.blocks
    bound = policy.bind(policy.blocks or _BLOCKS)
    assert not (fresh and policy.blocks), "bind() changed the policy that it was called on"
    blocks = bound.blocks
    for loss in (0.0, 0.5, 50.0):
        _check_scales(bound, Features.reference(blocks, loss))

    features = Features.reference(blocks)
    raw = bound(features)
    if bound.n_params:
        raw.sum().backward()
        for name, parameter in bound.named_parameters():
            assert parameter.grad is not None, f"the scales do not depend on {name}"
            assert bool(torch.isfinite(parameter.grad).all()), f"the gradient of {name} is not finite"
            parameter.grad = None
    turned = bound.bind(blocks[::-1])(Features.reference(blocks[::-1]))
    assert torch.allclose(turned.flip(0), raw, rtol=1e-4), "another order of the blocks gives other scales; is per_block complete?"
    with TemporaryDirectory() as folder:
        first, second = (bound.save_pretrained(Path(folder) / name) for name in ("a.safetensors", "b.safetensors"))
        assert first.read_bytes() == second.read_bytes(), "one policy gave two different files"
        again = Policy.from_pretrained(first)
        assert (again.blocks, again.config()) == (blocks, bound.config()), "a file gave another configuration or other blocks"
        assert torch.allclose(again(features), raw.to(torch.float32), rtol=1e-4), "a file gave other scales"


@torch.no_grad()
def _check_scales(policy: Policy, features: Features) -> None:
    parts = {**features.state(), "step": features.step, **policy.state_dict()}
    before = {name: tensor.clone() for name, tensor in parts.items()}
    with DeviceOnly():
        raw = policy(features)
        scales = policy.normalise(raw)
    for name, tensor in parts.items():
        assert torch.equal(tensor, before[name]), f"forward() changed {name}"
    assert torch.equal(policy(features), raw), "the same features gave different scales"
    assert raw.shape == (len(policy.blocks),), f"forward() gave shape {tuple(raw.shape)} for {len(policy.blocks)} blocks"
    assert raw.is_floating_point(), f"forward() gave {raw.dtype}"
    assert bool((torch.isfinite(raw) & (raw >= 0)).all()), f"scales must be finite and not negative, got {raw}"
    assert bool(torch.isfinite(scales).all()), "the normalised scales are not finite: is every raw scale 0?"
    if policy.normaliser.rule != "none":
        energy = float((policy.shares * scales.double().square()).sum())
        assert abs(energy - 1) < 1e-4, f"normalised scales have mean square {energy}, not 1"

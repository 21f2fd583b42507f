"""ZOOptimizer: arguments, skipped steps, interrupts, both closure forms, and the optimizer contract."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net, hook_count, lm_closure, net_closure, padded, state_bits, tiny
from torch import Tensor, nn

from zolightning.blocks import Block
from zolightning.estimators import TwoPoint
from zolightning.noise import GaussianNoise, Key, Noise
from zolightning.objectives import CandidateCrossEntropy
from zolightning.optim import SGD, ZOOptimizer
from zolightning.samplers import GaussianSampler, RademacherSampler
from zolightning.spaces import DenseSpace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BIG = 3e38


def make(model: nn.Module, **options: Any) -> ZOOptimizer:
    """An optimizer with steps that show in every dtype."""
    return ZOOptimizer(DenseSpace(model), **{"lr": 1e-2, "eps": 0.05, **options})


def run(optimizer: ZOOptimizer, model: nn.Module, first: int, last: int) -> None:
    """Steps ``first`` to ``last``, each with its own batch."""
    for step in range(first, last):
        optimizer.step(net_closure(model, step))


def run_bad(optimizer: ZOOptimizer, steps: int) -> None:
    """Steps whose loss is not a number."""
    for _ in range(steps):
        optimizer.step(lambda: torch.tensor(math.nan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be positive and finite"),
        ({"lr": -1.0}, "lr=-1.0 must be positive and finite"),
        ({"lr": math.inf}, "lr=inf must be positive and finite"),
        ({"lr": math.nan}, "lr=nan must be positive and finite"),
        ({"eps": 0.0}, "eps=0.0 must be positive and finite"),
        ({"eps": -1e-3}, "eps=-0.001 must be positive and finite"),
        ({"seed": -1}, r"seed=-1 must be between 0 and 2\*\*64 - 1"),
        ({"seed": 1 << 64}, r"seed=18446744073709551616 must be between 0 and 2\*\*64 - 1"),
        ({"max_skipped": 0}, "max_skipped=0 must be at least 1"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Net(), **options)


def test_defaults() -> None:
    """Gaussian, two-point with one direction, plain SGD."""
    optimizer = ZOOptimizer(DenseSpace(Net().eval()))
    assert isinstance(optimizer.sampler, GaussianSampler)
    assert (type(optimizer.estimator), optimizer.estimator.queries) == (TwoPoint, 1)
    assert (type(optimizer.rule), optimizer.rule.weight_decay) == (SGD, 0.0)
    assert (optimizer.steps, optimizer.forwards, optimizer.skipped) == (0, 0, 0)


@pytest.mark.parametrize("sampler", [GaussianSampler(), RademacherSampler()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_goes_down(dtype: torch.dtype, sampler: GaussianSampler) -> None:
    model = Net(dtype).eval()
    closure = net_closure(model)
    before = float(closure())
    optimizer = make(model, sampler=sampler, estimator=TwoPoint(4), lr=5e-2, eps=0.01 if dtype == torch.float32 else 0.1)
    for _ in range(20):
        optimizer.step(closure)
    assert float(closure()) < before - 0.1
    assert (optimizer.steps, optimizer.forwards, optimizer.skipped) == (20, 160, 0)


def test_what_a_step_reports() -> None:
    """The mean of the probe losses, and one coefficient per direction."""
    model = Net(torch.float64).eval()
    optimizer = make(model, estimator=TwoPoint(3), eps=1e-4)
    plain = float(net_closure(model)())
    loss = optimizer.step(net_closure(model))
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert abs(float(loss) - plain) < 1e-5
    assert optimizer.coefficients is not None
    assert optimizer.coefficients.shape == (3,)
    assert optimizer.setup_report is not None
    assert optimizer.setup_report.unread == []


def test_steps_follow_the_gradient_on_average() -> None:
    """Over many steps from one point, the mean move is -lr times the gradient, to 4.5 standard errors."""
    model = nn.Linear(5, 3).double().eval()
    closure = net_closure(model)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(closure(), list(model.parameters()))])
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, lr = make(model, lr=1e-3, eps=1e-4), 1e-3
    moves = []
    for _ in range(600):
        optimizer.step(closure)
        moves.append(torch.cat([(p.detach() - start[n]).flatten() for n, p in model.named_parameters()]) / -lr)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name])
    stacked = torch.stack(moves)
    error = stacked.std(0) / len(moves) ** 0.5
    assert float(((stacked.mean(0) - gradient).abs() / error).max()) < 4.5
    assert float(torch.nn.functional.cosine_similarity(stacked.mean(0), gradient, dim=0)) > 0.95


@pytest.mark.parametrize("value", [lambda loss: loss, float, lambda loss: loss.numpy()], ids=["tensor", "number", "numpy"])
def test_a_closure_may_return_a_number(value: Callable[[Tensor], Any]) -> None:
    """Without losing precision on the way."""
    model, other = Net(torch.float64).eval(), Net(torch.float64).eval()
    make(model).step(net_closure(model))
    make(other).step(lambda: value(net_closure(other)().detach()))
    assert state_bits(model) == state_bits(other)


@pytest.mark.parametrize("shape", [(1,), (2, 3)])
def test_a_loss_that_is_not_0d(shape: tuple[int, ...]) -> None:
    model = Net().eval()
    before = state_bits(model)
    with pytest.raises(ValueError, match=rf"the closure must return a 0-d loss, got shape \({shape[0]},"):
        make(model).step(lambda: net_closure(model)().expand(shape))
    assert state_bits(model) == before
    assert hook_count(model) == 0


def test_eps_too_small_for_the_dtype() -> None:
    model = Net(torch.bfloat16).eval()
    before = state_bits(model)
    with pytest.raises(ValueError, match="eps=1e-06 is below what bfloat16 weights of this size resolve"):
        make(model, eps=1e-6).step(net_closure(model))
    assert state_bits(model) == before


def test_overflow_at_set_up() -> None:
    """A model that overflows in float16 is named at the first step, with its weights intact."""
    model = Net(torch.float16).eval()
    with torch.no_grad():
        model.last.weight.fill_(60000.0)
    before = state_bits(model)
    with pytest.raises(
        ValueError, match=r"the loss at the set-up probe is (nan|inf): the model overflows in float16, or eps=0.05 is too large"
    ):
        make(model).step(net_closure(model))
    assert state_bits(model) == before


def test_set_up_happens_once_and_is_not_counted() -> None:
    model = Net().eval()
    calls: list[int] = []
    optimizer = make(model)

    def closure() -> Tensor:
        calls.append(1)
        return net_closure(model)()

    for _ in range(3):
        optimizer.step(closure)
    assert len(calls) == 1 + 6
    assert optimizer.forwards == 6


def test_no_further_groups() -> None:
    with pytest.raises(ValueError, match="moves the blocks of its space and takes no further parameter groups"):
        make(Net()).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_global_random_state_is_untouched() -> None:
    model = Net().eval()
    optimizer, before = make(model), torch.get_rng_state()
    run(optimizer, model, 0, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_stay_empty() -> None:
    model = Net().eval()
    run(make(model), model, 0, 2)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class TestNotFinite:
    """Losses that are not finite."""

    @staticmethod
    def bad_at(model: nn.Module, step: int, bad: set[int], value: float, call: int) -> Callable[[], Tensor]:
        """The step's loss, not finite at one of its probes."""
        calls: list[int] = []

        def closure() -> Tensor:
            calls.append(1)
            loss = net_closure(model, step)()
            return loss * value if step in bad and len(calls) == call else loss

        return closure

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("call", [1, 2])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_step_is_skipped(self, dtype: torch.dtype, call: int, value: float) -> None:
        """Weights keep their bits although weight decay is on; it is counted; later steps have the noise of their number."""
        model, smooth = Net(dtype).eval(), Net(dtype).eval()
        options = {"rule": SGD(weight_decay=0.1), "eps": 0.1}
        optimizer, other = make(model, **options), make(smooth, **options)
        run(optimizer, model, 0, 2)
        run(other, smooth, 0, 2)
        before = state_bits(model)
        loss = optimizer.step(self.bad_at(model, 2, {2}, value, call))
        assert not math.isfinite(float(loss))
        assert state_bits(model) == before
        assert (optimizer.steps, optimizer.forwards, optimizer.skipped) == (3, 6, 1)
        other.param_groups[0]["step"] = 3
        run(optimizer, model, 3, 5)
        run(other, smooth, 3, 5)
        assert state_bits(model) == state_bits(smooth)
        assert optimizer.skipped == 1

    @pytest.mark.parametrize("limit", [1, 5, 40])
    def test_many_in_a_row_stop(self, limit: int) -> None:
        """The text names the last good step; the weights are still that step's."""
        model = Net().eval()
        optimizer = make(model, max_skipped=limit)
        run(optimizer, model, 0, 1)
        before = state_bits(model)
        message = r"steps in a row \(to step \d+\) gave a loss that is not finite; .* Lower lr=0\.01 or eps=0\.05"
        with pytest.raises(RuntimeError, match=message) as caught:
            run_bad(optimizer, 200)
        assert "the weights are those of step 1." in str(caught.value)
        assert state_bits(model) == before
        assert limit <= optimizer.skipped <= max(2 * limit, 64)

    def test_scattered_ones_do_not_stop(self) -> None:
        model = Net().eval()
        optimizer = make(model, max_skipped=3)
        bad = {step for step in range(1, 60) if step % 3}
        for step in range(60):
            optimizer.step(self.bad_at(model, step, bad, math.nan, 1))
        assert optimizer.skipped == len(bad)
        assert optimizer.steps == 60

    def test_overflow_to_infinity_and_back(self) -> None:
        """Both probes infinite: their difference is not a number, and no weight sees it."""
        model = Net().eval()
        optimizer = make(model)
        run(optimizer, model, 0, 1)
        before = state_bits(model)
        optimizer.step(lambda: net_closure(model)() * BIG * BIG)
        assert state_bits(model) == before


class SignalInUpdate(GaussianSampler):
    """Sends SIGINT while the third block is being moved (not while probing)."""

    def __init__(self) -> None:
        self.armed = False
        self.seen: list[str] = []

    def noise(self, block: Block, key: Key) -> Noise:
        if self.armed:
            self.seen.append(block.name)
            if len(self.seen) == 3:
                signal.raise_signal(signal.SIGINT)
        return GaussianNoise(key)


@pytest.mark.parametrize("dtype", DTYPES)
def test_interrupt_inside_the_update(dtype: torch.dtype) -> None:
    """The update is finished, its step counted, and then the interrupt is raised; a run that goes on has lost nothing."""
    model, smooth, sampler = Net(dtype).eval(), Net(dtype).eval(), SignalInUpdate()
    optimizer, other = make(model, sampler=sampler), make(smooth)
    run(optimizer, model, 0, 2)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        loss = net_closure(model, 2)()
        sampler.armed = len(calls) == 2  # after the last probe's forward
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    sampler.armed = False
    assert len(sampler.seen) == len(optimizer.space.blocks)
    assert optimizer.steps == 3
    run(other, smooth, 0, 3)
    assert state_bits(model) == state_bits(smooth)
    run(optimizer, model, 3, 5)
    run(other, smooth, 3, 5)
    assert state_bits(model) == state_bits(smooth)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("call", [1, 2, 3])
def test_interrupt_inside_a_probe(call: int) -> None:
    """Set-up, plus or minus probe: the weights are the old ones, and the same step can be taken again."""
    model, smooth = Net().eval(), Net().eval()
    optimizer, calls = make(model), []
    before = state_bits(model)

    def closure() -> Tensor:
        calls.append(1)
        loss = net_closure(model)()
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert state_bits(model) == before
    assert hook_count(model) == 0
    assert optimizer.steps == 0
    run(optimizer, model, 0, 2)
    run(make(smooth), smooth, 0, 2)
    assert state_bits(model) == state_bits(smooth)


def one_token_batch() -> dict[str, Tensor]:
    """Four prompts with three one-token candidates each."""
    batch = padded([[5, 9, 3], [7, 8], [30, 31, 32, 33], [4]])
    return {**batch, "candidates": torch.tensor([[10, 11, 12]] * 4), "label": torch.tensor([0, 1, 2, 1])}


def test_both_closure_forms_take_the_same_step() -> None:
    """A plain closure, a bound objective, its rows alone and micro-batches of everything give the same weights."""
    weights = []
    for form in ("plain", "bound", "rows", "whole micro-batch"):
        model = tiny("llama", torch.bfloat16)
        optimizer = make(model, eps=0.02)
        bound = CandidateCrossEntropy().on(model, one_token_batch(), 4 if form == "whole micro-batch" else None)
        for _ in range(3):
            if form == "plain":
                optimizer.step(lambda bound=bound: bound())  # type: ignore[misc]
            elif form == "rows":
                optimizer.step(lambda: pytest.fail("rows come first"), bound=bound)
            else:
                optimizer.step(bound)
        weights.append(state_bits(model))
    assert weights[0] == weights[1] == weights[2] == weights[3]


def test_micro_batches_take_almost_the_same_step() -> None:
    models = [tiny("llama", torch.float64) for _ in range(2)]
    for model, size in zip(models, (None, 3), strict=True):
        optimizer = make(model, lr=1e-3, eps=1e-3)
        for _ in range(3):
            optimizer.step(CandidateCrossEntropy().on(model, one_token_batch(), size))
    for one, two in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(one, two, atol=1e-10)


def test_tied_weights_move_once() -> None:
    """The move of a tied weight is that of one block, and the tie holds."""
    model = tiny("llama", torch.float64, tied=True)
    start = model.model.embed_tokens.weight.detach().clone()
    optimizer = make(model, lr=1e-3)
    optimizer.step(lm_closure(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    block = next(b for b in optimizer.space.blocks if b.name == "model.embed_tokens.weight")
    z = GaussianNoise(Key(0, block.id, 0)).draw(0, block.numel, torch.device("cpu")).double().view_as(start)
    assert optimizer.coefficients is not None
    assert torch.allclose(model.lm_head.weight, start - 1e-3 * optimizer.coefficients[0] * z, atol=1e-14)


def test_weight_decay_reaches_every_element() -> None:
    """With a constant loss only the decay is left; it covers rows that no batch sees."""
    model = Net(torch.float64).eval()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    make(model, rule=SGD(weight_decay=0.5)).step(lambda: net_closure(model)() * 0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name] - start[name] * (1e-2 * 0.5)), name

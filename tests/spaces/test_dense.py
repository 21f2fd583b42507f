"""DenseSpace: probes are read-only and real, whatever happens inside them."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from nets import Net, bits, hook_count, lm_closure, net_closure, state_bits, tiny
from torch import Tensor, nn

from zolightning.kernels import materialise
from zolightning.noise import GaussianNoise, Noise
from zolightning.samplers import Direction, GaussianSampler
from zolightning.spaces import DenseSpace, SetupReport, Space
from zolightning.spaces.resolution import resolvable_eps
from zolightning.testing import check_space

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def direction(space: Space, seed: int = 0, step: int = 0) -> Direction:
    """A Gaussian direction."""
    sampler = GaussianSampler()
    sampler.bind(space)
    return sampler.directions(seed, step, 1)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


class Recurrent(nn.Module):
    """Reads cached lists of weights (LSTM) and a cell's weights by attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell = nn.LSTM(8, 8), nn.GRUCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.lstm(x)[0]
        return self.cell(out[0], out[1])


class Lists(nn.Module):
    """Parameters in containers that have no forward of their own, and one on the root."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(2)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(8))})
        self.own = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.listed[0] + self.listed[1]) * self.named["a"] * self.own


class Twice(nn.Module):
    """Runs one module two times and ties two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(torch.tanh(self.one(x)))))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "recurrent": Recurrent,
    "lists": Lists,
    "twice": Twice,
    "encoder-layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "weight-norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh()),
    "spectral-norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh()),
    "convolution": lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.PReLU()),
    "group-norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(3, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_common_on_plain_modules(name: str) -> None:
    """The common test, with every block really perturbed."""
    model = MODULES[name]().eval()
    x, target = torch.randn(2, 3, 8), torch.randn(8)

    def closure() -> Tensor:
        out = model(x)
        return (out - target[: out.shape[-1]]).square().mean()

    check_space(DenseSpace(model), closure)


@pytest.mark.parametrize("dtype", DTYPES)
def test_common_on_every_dtype(dtype: torch.dtype) -> None:
    model = Net(dtype).eval()
    check_space(DenseSpace(model), net_closure(model), eps=0.1)


def test_probe_is_the_loss_at_the_perturbed_weights() -> None:
    """The same loss as that of a copy whose weights were written."""
    model, copy = Net(), Net()
    space = DenseSpace(model)
    along = direction(space)
    with torch.no_grad():
        for block, parameter in zip(space.blocks, copy.parameters(), strict=True):
            parameter.copy_(materialise(block.tensor, torch.tensor(-0.05), along.noise(block)))
        with space.probe(along, -0.05):
            loss = net_closure(model)()
        assert torch.equal(loss, net_closure(copy)())


def test_scales_multiply_the_noise() -> None:
    model = nn.Linear(3, 2).eval()
    space = DenseSpace(model)
    along = direction(space)
    scaled = Direction(along.sampler, 0, 0, 0, torch.tensor([0.0, 2.0]))
    x = torch.randn(4, 3)
    with torch.no_grad(), space.probe(scaled, 0.5):
        out = model(x)
    z = along.noise(space.blocks[1]).draw(0, 2, torch.device("cpu"))
    assert torch.allclose(out, x @ model.weight.T + model.bias + z, atol=1e-6)


class Bomb(nn.Module):
    """Does something dreadful in the middle of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.action: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.action()
        return x


def raises(error: BaseException) -> Callable[[], None]:
    """A function that raises."""

    def action() -> None:
        raise error

    return action


def bombed() -> tuple[nn.Module, Bomb]:
    """A network with a bomb inside a module that has weights of its own."""
    net, bomb = Net().eval(), Bomb()
    net.last = nn.Sequential(nn.Linear(7, 7), bomb, nn.Linear(7, 3))
    return net, bomb


ACTIONS: dict[str, tuple[Callable[[], None], type[BaseException]]] = {
    "error": (raises(ArithmeticError("out of luck")), ArithmeticError),
    "interrupt": (raises(KeyboardInterrupt()), KeyboardInterrupt),
    "exit": (raises(SystemExit(1)), SystemExit),
    "signal": (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
}


@pytest.mark.parametrize("where", ["forward", "closure"])
@pytest.mark.parametrize("name", ACTIONS)
def test_nothing_is_left_after(name: str, where: str) -> None:
    """Errors, Ctrl-C and a real SIGINT inside a probe: same bits, same Parameter objects, no hooks; the next probe is sound."""
    action, error = ACTIONS[name]
    model, bomb = bombed()
    space, closure = DenseSpace(model), net_closure(model)
    along = direction(space)
    before, parameters = state_bits(model), {n: id(p) for n, p in model.named_parameters()}

    def detonate() -> None:
        with space.probe(along, 0.1):
            bomb.action = action if where == "forward" else bomb.action
            closure()
            action()

    with torch.no_grad():
        with space.probe(along, 0.1):
            expected = closure()
        with pytest.raises(error):
            detonate()
        bomb.action = lambda: None
        assert state_bits(model) == before
        assert {n: id(p) for n, p in model.named_parameters()} == parameters
        assert hook_count(model) == 0
        with space.probe(along, 0.1):
            assert torch.equal(closure(), expected)


def test_users_own_hooks_stay() -> None:
    model = Net().eval()
    calls: list[int] = []
    model.last.register_forward_hook(lambda *a: calls.append(1))
    space = DenseSpace(model)
    with torch.no_grad(), space.probe(direction(space), 0.1):
        net_closure(model)()
    assert hook_count(model) == 1
    assert calls == [1]


def interrupt_at(count: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that sends SIGINT at the n-th instruction of setting hooks, swapping and restoring."""
    left = count
    lines, first = inspect.getsourcelines(DenseSpace.probe)
    body = first + next(number for number, line in enumerate(lines) if line.strip() == "yield")

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        name = frame.f_code.co_name
        if not frame.f_code.co_filename.endswith("spaces/swapping.py") or name not in ("probe", "_swap", "_restore"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and (name != "probe" or (frame.f_lineno or body + 1) <= body):
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    return trace


def test_an_interrupt_at_any_instruction() -> None:
    """Ctrl-C while hooks are set, while weights are swapped in, while they are put back: nothing is left."""
    model = nn.Sequential(nn.Linear(5, 3), nn.PReLU()).eval()
    space, closure = DenseSpace(model), net_closure(model)
    along, before = direction(space), state_bits(model)
    interrupted = 0
    for count in range(1, 2000):
        sys.settrace(interrupt_at(count))
        try:
            with torch.no_grad(), space.probe(along, 0.1):
                closure()
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break
        finally:
            sys.settrace(None)
        assert hook_count(model) == 0, count
        assert state_bits(model) == before, count
    assert 200 < interrupted < 1999


def test_tied_weights_are_one_block() -> None:
    model = tiny("llama", tied=True)
    space = DenseSpace(model)
    names = [block.name for block in space.blocks]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert space.numel == sum(p.numel() for p in model.parameters())


def test_tied_weights_are_perturbed_alike_everywhere() -> None:
    """Both uses of a tied weight see the same perturbed values."""
    model = tiny("llama", tied=True)
    space = DenseSpace(model, include=["model.embed_tokens.weight"])
    along = direction(space)
    written = tiny("llama", tied=True)
    with torch.no_grad():
        written.lm_head.weight.copy_(materialise(space.blocks[0].tensor, torch.tensor(0.1), along.noise(space.blocks[0])))
        with space.probe(along, 0.1):
            assert torch.equal(lm_closure(model)(), lm_closure(written)())


def test_include_and_exclude() -> None:
    model = Net()
    assert [b.name for b in DenseSpace(model, include=["*.weight"]).blocks] == ["first.weight", "norm.weight", "last.weight"]
    assert [b.name for b in DenseSpace(model, include=["*.weight"], exclude=["norm.*"]).blocks] == ["first.weight", "last.weight"]
    assert [b.name for b in DenseSpace(model, exclude=["*.*"]).blocks] == ["scale"]


def test_frozen_parameters_and_integers_stay_out() -> None:
    model = Net()
    model.first.requires_grad_(False)
    model.counts = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    assert [b.name for b in DenseSpace(model).blocks] == ["scale", "norm.weight", "norm.bias", "last.weight", "last.bias"]


def test_empty_parameters_stay_out() -> None:
    """A parameter of no elements is no block, and does not switch the check of eps off."""
    model = Net(torch.bfloat16).eval()
    model.nothing = nn.Parameter(torch.zeros(0, 3, dtype=torch.bfloat16))
    space = DenseSpace(model)
    assert "nothing" not in [b.name for b in space.blocks]
    with torch.no_grad(), pytest.raises(ValueError, match="eps=1e-06 is below"):
        space.verify(net_closure(model), direction(space), 1e-6)


class TestRefusals:
    """One clear line each, and nothing is lost."""

    def test_a_pattern_that_matches_nothing(self) -> None:
        with pytest.raises(ValueError, match=r"pattern 'decoder\.\*' matches no parameter; names look like 'scale'"):
            DenseSpace(Net(), include=["decoder.*"])
        with pytest.raises(ValueError, match=r"pattern '\*embed\*' matches no parameter"):
            DenseSpace(Net(), exclude=["*embed*"])

    def test_two_parameters_over_one_memory(self) -> None:
        """Neither the same memory nor a part of it: each would get noise of its own."""
        for part in (slice(None), slice(1, 2)):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            model[1].weight = nn.Parameter(model[0].weight.data[part])
            with pytest.raises(ValueError, match=r"^parameters '0.weight' and '1.weight' lie in the same memory: make them one parameter"):
                DenseSpace(model)
        model[1].weight = model[0].weight
        assert [block.name for block in DenseSpace(model).blocks] == ["0.weight", "0.bias", "1.bias"]

    def test_all_excluded(self) -> None:
        with pytest.raises(ValueError, match=r"nothing to move: 7 parameters, 0 of them frozen, include=\[\], exclude=\['\*'\]"):
            DenseSpace(Net(), exclude=["*"])

    def test_all_frozen(self) -> None:
        with pytest.raises(ValueError, match="nothing to move: 7 parameters, 7 of them frozen"):
            DenseSpace(Net().requires_grad_(False))

    def test_no_parameters(self) -> None:
        with pytest.raises(ValueError, match="nothing to move: 0 parameters"):
            DenseSpace(nn.Tanh())

    def test_not_contiguous(self) -> None:
        model = nn.Linear(3, 4)
        model.weight = nn.Parameter(torch.randn(3, 4).t())
        with pytest.raises(ValueError, match=r"block 'weight' is not contiguous in memory; call .contiguous\(\) on it first"):
            DenseSpace(model)

    @pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 1e-6), (torch.float16, 1e-7), (torch.float32, 1e-12)])
    def test_eps_below_the_resolution(self, dtype: torch.dtype, eps: float) -> None:
        """The text names a distance that works."""
        model = Net(dtype).eval()
        space = DenseSpace(model)
        name = str(dtype).removeprefix("torch.")
        with torch.no_grad():
            with pytest.raises(
                ValueError, match=rf"eps={eps:g} is below what {name} weights of this size resolve \(about (.+)\)"
            ) as caught:
                space.verify(net_closure(model), direction(space), eps)
            enough = float(str(caught.value).partition("about ")[2].rstrip(")"))
            assert enough > eps
            report = space.verify(net_closure(model), direction(space), 2 * enough)
        assert 0.5 <= report.resolved <= 1

    def test_blocks_of_scale_0_do_not_count(self) -> None:
        """Neither in the distance that would be enough, nor where nothing of a space moves."""
        model = Net(torch.bfloat16).eval()
        space, moves = DenseSpace(model), DenseSpace(model, include=["last.weight"])
        scales = torch.tensor([float(block.name == "last.weight") for block in space.blocks])
        assert resolvable_eps(space.blocks, scales) == resolvable_eps(moves.blocks, torch.ones(1))
        with torch.no_grad():
            still = replace(direction(space), scales=torch.zeros(7))
            assert space.verify(net_closure(model), still, 1e-6).resolved == 1

    def test_training_mode(self) -> None:
        """Batch norm would write its buffers; it is stopped before the first write."""
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
        before = state_bits(model)
        space = DenseSpace(model)
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"the model writes '1.num_batches_tracked' in its forward; call model.eval\(\)"),
        ):
            space.verify(net_closure(model), direction(space), 1e-3)
        assert state_bits(model) == before
        assert hook_count(model) == 0

    def test_a_model_that_rescales_its_own_weights(self) -> None:
        """The write is refused before it happens."""

        class Rescaling(Net):
            def forward(self, x: Tensor) -> Tensor:
                self.last.weight.div_(2)
                return super().forward(x)

        model = Rescaling().eval()
        before, space = state_bits(model), DenseSpace(model)
        with torch.no_grad(), pytest.raises(ValueError, match=r"the model writes 'last.weight' in its forward"):
            space.verify(net_closure(model), direction(space), 1e-3)
        assert state_bits(model) == before

    def test_dropout(self) -> None:
        model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
        space = DenseSpace(model)
        with torch.no_grad(), pytest.raises(ValueError, match=r"draws dropout masks.*call model.eval\(\)"):
            space.verify(net_closure(model), direction(space), 1e-3)

    def test_attention_dropout(self) -> None:
        model = tiny("llama")
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        space = DenseSpace(model)
        with torch.no_grad():
            space.verify(lm_closure(model), direction(space), 1e-3)
            model.train()
            with pytest.raises(ValueError, match="draws dropout masks"):
                space.verify(lm_closure(model), direction(space), 1e-3)

    def test_weights_read_past_the_modules(self) -> None:
        """A grandparent's read is refused by name, and excluding the block helps."""

        class Past(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.outer = nn.ModuleDict({"inner": nn.ModuleDict({"deep": nn.Linear(5, 3)})})
                self.other = nn.Linear(5, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.other(x) + x @ self.outer["inner"]["deep"].weight.T + self.outer["inner"]["deep"].bias

        model = Past().eval()
        before, space = state_bits(model), DenseSpace(model)
        with torch.no_grad():
            with pytest.raises(
                ValueError, match=r"'outer.inner.deep.bias', 'outer.inner.deep.weight': read outside the forward .* exclude it"
            ):
                space.verify(net_closure(model), direction(space), 1e-3)
            assert state_bits(model) == before
            rest = DenseSpace(model, exclude=["outer.*"])
            assert rest.verify(net_closure(model), direction(rest), 1e-3).unread == []

    def test_a_closure_that_reads_the_weights_itself(self) -> None:
        model = Net().eval()
        space = DenseSpace(model)
        with torch.no_grad(), pytest.raises(ValueError, match=r"'last\.weight': read outside the forward"):
            space.verify(lambda: net_closure(model)() + model.last.weight.square().sum(), direction(space), 1e-3)


def test_unused_blocks_are_listed() -> None:
    model = Net().eval()
    model.spare = nn.Linear(2, 2)
    space = DenseSpace(model)
    with torch.no_grad():
        report = space.verify(net_closure(model), direction(space), 1e-3)
    assert report.unread == ["spare.weight", "spare.bias"]
    assert report.lifted == []


def test_small_unresolved_blocks_are_only_listed() -> None:
    """A norm of ones in bfloat16 does not see a small eps; the large matrix does."""
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)).to(torch.bfloat16).eval()
    space = DenseSpace(model)
    x = torch.randn(2, 32).bfloat16()
    with torch.no_grad():
        report = space.verify(lambda: model(x).float().square().sum() + model(x).float()[0, 0], direction(space), 1e-3)
    assert report.unresolved == ["1.weight"]
    assert report.resolved > 0.5


def test_a_write_to_an_empty_tensor_is_nobodys() -> None:
    """Tensors without memory share the address 0; they are not each other."""

    class Empty(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("nothing", torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            torch.zeros(0).add_(1)
            return super().forward(x)

    model = Empty().eval()
    space = DenseSpace(model)
    with torch.no_grad():
        assert space.verify(net_closure(model), direction(space), 1e-3).unread == []


class TestMove:
    """The update of a space."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_directions_add_up(self, dtype: torch.dtype) -> None:
        model = Net(dtype)
        space = DenseSpace(model)
        sampler = GaussianSampler()
        sampler.bind(space)
        directions = sampler.directions(3, 4, 2)
        before = [block.tensor.detach().clone().double() for block in space.blocks]
        with torch.no_grad():
            space.move(directions, torch.tensor([0.01, -0.02], dtype=space.compute_dtype), 0.1, torch.tensor(True))
        for block, old in zip(space.blocks, before, strict=True):
            z = [d.noise(block).draw(0, block.numel, torch.device("cpu")).double().view_as(old) for d in directions]
            expected = 0.9 * old + 0.01 * z[0] - 0.02 * z[1]
            unit = torch.finfo(dtype).eps * expected.abs().clamp_min(torch.finfo(dtype).smallest_normal)
            assert bool(((block.tensor.double() - expected).abs() <= 2 * unit + 1e-8 * (dtype != torch.float64)).all())

    def test_parameters_stay_the_same_objects(self) -> None:
        model = Net()
        objects = [id(p) for p in model.parameters()]
        space = DenseSpace(model)
        with torch.no_grad():
            space.move([direction(space)], torch.tensor([1.0]), 0.0, torch.tensor(True))
        assert [id(p) for p in model.parameters()] == objects
        assert all(p.requires_grad for p in model.parameters())


class TestCommonTestFindsMistakes:
    """check_space refuses spaces that are wrong."""

    @staticmethod
    def check(kind: type[DenseSpace], complaint: str) -> None:
        model = Net().eval()
        with pytest.raises(AssertionError, match=complaint):
            check_space(kind(model), net_closure(model))

    def test_in_place_walk(self) -> None:
        """The field's usual add and subtract does not come back to the same bits."""

        class Walk(DenseSpace):
            def verify(self, *arguments: Any) -> SetupReport:
                return SetupReport()  # the real one refuses the walk at once

            def probe(self, direction: Direction, distance: float, hold: bool = False) -> Any:
                @contextmanager
                def walk() -> Iterator[None]:
                    for sign in (1, -1):
                        for block in self.blocks:
                            z = direction.noise(block).draw(0, block.numel, torch.device("cpu")).view_as(block.tensor)
                            block.tensor.add_(z, alpha=sign * distance)
                        if sign == 1:
                            yield

                return walk()

        self.check(Walk, "changed|different losses")

    def test_ignored_sign(self) -> None:
        class Unsigned(DenseSpace):
            def probe(self, direction: Direction, distance: float, hold: bool = False) -> Any:
                return super().probe(direction, abs(distance), hold)

        self.check(Unsigned, "does not respond to the sign")

    def test_forgotten_block(self) -> None:
        class Forgetful(DenseSpace):
            def probe(self, direction: Direction, distance: float, hold: bool = False) -> Any:
                scales = direction.scales.clone()
                scales[1] = 0
                return super().probe(Direction(direction.sampler, direction.seed, direction.step, direction.query, scales), distance)

        self.check(Forgetful, "first.weight: not perturbed")

    def test_turns_that_need_the_host_or_leave_nothing(self) -> None:
        class Waiting(DenseSpace):
            def active(self, clock: Tensor) -> Tensor:
                return torch.ones(len(self.blocks)) * (int(clock) >= 0)

        class Resting(DenseSpace):
            def active(self, clock: Tensor) -> Tensor:
                return (clock < 1000).float().expand(len(self.blocks))

        self.check(Waiting, "waits for the host")
        self.check(Resting, "and 1 somewhere")

    def test_moves_when_not_valid(self) -> None:
        class Eager(DenseSpace):
            def move(self, directions: Any, weights: Tensor, shrink: float, valid: Tensor) -> None:
                super().move(directions, weights, shrink, torch.tensor(True))

        self.check(Eager, "an update that is not valid")


def test_noise_is_drawn_in_one_place_only() -> None:
    """A probe draws each untied block once per forward of its module: no hidden second pass."""
    drawn: list[str] = []

    class Counting(GaussianSampler):
        def noise(self, block: Any, key: Any) -> Noise:
            drawn.append(block.name)
            return GaussianNoise(key)

    model = Net().eval()
    space, sampler = DenseSpace(model), Counting()
    sampler.bind(space)
    space.prepare(sampler, 0, 0)  # looks at the kind of noise
    drawn.clear()
    with torch.no_grad(), space.probe(sampler.directions(0, 0, 1)[0], 0.1):
        net_closure(model)()
    assert sorted(drawn) == sorted(block.name for block in space.blocks)
    assert bits(model.scale) == bits(Net().scale)

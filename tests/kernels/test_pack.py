"""Many tensors in one pass: the bits of one after another, in plain torch and in Triton's interpreter (or on the GPU)."""

from __future__ import annotations

import pytest
import torch
from nets import bits
from torch import Tensor, nn

import zolightning as zl
from zolightning import kernels
from zolightning.kernels import Pack, Update, pack, plain
from zolightning.noise import GaussianNoise, Key, Noise, Purpose, RademacherNoise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((3, 700), (5,), (1,), (), (16, 9), (2048,), (7, 300))
KINDS: tuple[type[Noise], ...] = (GaussianNoise, RademacherNoise)
needs_triton = pytest.mark.skipif(not pack.FUSED_DEVICES, reason="needs triton")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels also for tensors on the CPU."""
    monkeypatch.setattr(pack, "FUSED_DEVICES", {"cuda", "cpu"})


def tensors(dtypes: list[torch.dtype]) -> list[Tensor]:
    """Tensors of many shapes; the types take turns."""
    return [torch.randn(shape).to(dtypes[i % len(dtypes)]).to(DEVICE) for i, shape in enumerate(SHAPES)]


def noises(kind: type[Noise], query: int = 0) -> list[Noise]:
    return [kind(Key(9, 100 + block, 4, query)) for block in range(len(SHAPES))]


def amounts(count: int = len(SHAPES)) -> Tensor:
    return torch.linspace(-0.3, 0.5, count, device=DEVICE)


@needs_triton
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float16, torch.float32], [torch.float32, torch.bfloat16, torch.float16]])
class TestOneLaunch:
    def test_perturbed_copies(self, kind: type[Noise], dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
        """Both signs of every tensor; the places in the amounts are the given ones."""
        weights, slots = tensors(dtypes), [6, 5, 4, 3, 2, 1, 0]
        made = Pack(weights, range(100, 107), slots).materialise(amounts(), noises(kind), copies=2)
        monkeypatch.setattr(pack, "FUSED_DEVICES", set())
        for weight, slot, noise, pair in zip(weights, slots, noises(kind), made, strict=True):
            assert pair.shape == (2, *weight.shape)
            for sign, copy in zip((1, -1), pair, strict=True):
                assert bits(copy.contiguous()) == bits(kernels.materialise(weight.cpu(), sign * amounts()[slot].cpu(), noise))

    def test_update(self, kind: type[Noise], dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
        """Three queries and weight decay."""
        weights = tensors(dtypes)
        one, two = [w.cpu().clone() for w in weights], [w.clone() for w in weights]
        factors, rows = torch.randn(3, len(SHAPES)) * 1e-2, [noises(kind, query) for query in range(3)]
        yes = torch.tensor(True)
        Pack(two, range(100, 107)).update(factors.to(DEVICE), rows, torch.tensor(0.01, device=DEVICE), yes.to(DEVICE))
        monkeypatch.setattr(pack, "FUSED_DEVICES", set())
        Pack(one, range(100, 107)).update(factors, rows, 0.01, yes)
        assert [bits(w) for w in one] == [bits(w) for w in two]

    @pytest.mark.parametrize("width", [100, 112])
    def test_parts_of_a_block(self, kind: type[Noise], dtypes: list[torch.dtype], width: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows of a matrix draw the noise of their place in it, for any purpose, in the middle of 128 signs or where such begin."""
        whole, yes = torch.randn(24, width).to(dtypes[0]).to(DEVICE), torch.tensor(True, device=DEVICE)
        parts = [whole.clone()[rows] for rows in (slice(0, 8), slice(8, 24))]
        noise = kind(Key(9, 100, 4), purpose=Purpose.BASIS)
        for devices in (pack.FUSED_DEVICES, set()):
            monkeypatch.setattr(pack, "FUSED_DEVICES", devices)
            cut = Pack(parts, [100, 100], [0, 0], [0, 8 * width])
            made = Pack([whole], [100]).materialise(amounts(1), [noise], copies=2)[0]
            assert bits(torch.cat(cut.materialise(amounts(1), [noise] * 2, copies=2), dim=1)) == bits(made.clone())
            moved = whole.clone()
            Pack([moved], [100]).update(amounts(1)[None], [[noise]], 0.0, yes)
            own = [part.clone() for part in parts]
            Pack(own, [100, 100], [0, 0], [0, 8 * width]).update(amounts(1)[None], [[noise] * 2], 0.0, yes)
            assert bits(torch.cat(own)) == bits(moved)

    def test_long_programs(self, kind: type[Noise], dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
        """Programs that work on several parts, the last one empty or cut, have the bits of short ones."""
        weight, yes, results = torch.randn(3, 5000).to(dtypes[0]).to(DEVICE), torch.tensor(True, device=DEVICE), []
        noise = kind(Key(9, 100, 4))
        for many in (1 << 30, 0):
            monkeypatch.setattr("zolightning.kernels.fused._MANY", many)
            moved = [weight.clone(), weight[:1, :2049].clone()]
            both = Pack(moved, [100, 100])
            made = both.materialise(amounts(2), [noise] * 2, copies=2)
            both.update(amounts(2)[None], [[noise] * 2], 0.01, yes)
            rate, clock = torch.tensor(0.01, device=DEVICE), torch.tensor(3, device=DEVICE)
            made += both.advance(Update(amounts(2)[None], [noise] * 2, rate, yes, clock), amounts(2), [noise] * 2, copies=2)
            results.append([bits(t.clone()) for t in (*made, *moved)])
        assert results[0] == results[1]

    def test_the_clock_is_the_step(self, kind: type[Noise], dtypes: list[torch.dtype]) -> None:
        """What counts on the device is the clock, not the step in the noises' keys."""
        weights, yes = tensors(dtypes), torch.tensor(True, device=DEVICE)
        late = [kind(Key(9, 100 + block, 77)) for block in range(len(SHAPES))]
        clock = torch.tensor(4, device=DEVICE)
        one = Pack(weights, range(100, 107)).materialise(amounts(), late, clock)
        two = Pack(weights, range(100, 107)).materialise(amounts(), noises(kind))
        assert [bits(w.clone()) for w in one] == [bits(w.clone()) for w in two]
        moved = [w.clone() for w in weights], [w.clone() for w in weights]
        Pack(moved[0], range(100, 107)).update(amounts()[None], [late], 0.0, yes, clock)
        Pack(moved[1], range(100, 107)).update(amounts()[None], [noises(kind)], 0.0, yes)
        assert [bits(w) for w in moved[0]] == [bits(w) for w in moved[1]]


@needs_triton
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtypes", "copies", "valid"),
    [([torch.bfloat16, torch.float16], 1, False), ([torch.float32, torch.bfloat16, torch.float16], 2, True)],
)
def test_advance(kind: type[Noise], dtypes: list[torch.dtype], copies: int, valid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass moves the weights by step 4, or not at all (by NaN), and shows step 5: the bits of two passes in plain torch."""
    weights, slots, results = tensors(dtypes), [6, 5, 4, 3, 2, 1, 0], []
    weights[0][:, ::3] = -0.0
    rates = torch.tensor([[0.01, -0.02, 0.0, 0.003 if valid else torch.nan, 0.02, -1e-5, 0.0]])
    now = [kind(Key(9, 100 + block, 5)) for block in range(7)]
    for fused, step in ((pack.FUSED_DEVICES, 77), (set(), 4)):  # the kernels go by the clock
        monkeypatch.setattr(pack, "FUSED_DEVICES", fused)
        own = [weight.clone().to(DEVICE if fused else "cpu") for weight in weights]
        device = own[0].device
        noises = [kind(Key(9, 106 - slot, step)) for slot in range(7)]
        move = Update(rates.to(device), noises, *(torch.tensor(value, device=device) for value in (0.01, valid, 4)))
        made = Pack(own, range(100, 107), slots).advance(move, amounts().to(device), now, copies=copies)
        assert all(m.shape == (copies, *w.shape) for m, w in zip(made, own, strict=True))
        results.append([bits(t) for t in (*own, *made)])
    assert results[0] == results[1]
    assert (results[0][:7] == [bits(weight) for weight in weights]) != valid


@needs_triton
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("width", [8, 24, 17, 576])
@pytest.mark.parametrize("kind", KINDS)
def test_rows(kind: type[Noise], width: int) -> None:
    """Looked-up rows are those of the whole perturbed matrix, however aligned; the second half has the other sign, also of zero."""
    weight, noise, slots = torch.randn(50, width).bfloat16().to(DEVICE), kind(Key(1, 2, 3)), torch.tensor([0.0, 0.2], device=DEVICE)
    ids = torch.tensor([[49, 0, 7], [7, 1, 0], [3, 3, 48], [49, 2, 1]], device=DEVICE)
    weight[:, ::3] = -0.0
    for slot in range(2):
        plus, minus = Pack([weight], [2], [slot]).materialise(slots, [noise], copies=2)[0]
        assert bits(kernels.rows(weight, ids, slots, slot, noise, None, 1)) == bits(plus[ids])
        assert bits(kernels.rows(weight, ids, slots, slot, noise, None, 2)) == bits(torch.cat([plus[ids[:2]], minus[ids[2:]]]))


@needs_triton
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numel", [1, 7, 4000])
def test_noise_alone(kind: type[Noise], numel: int) -> None:
    """The noise of a block without a weight."""
    noise = kind(Key(1, 2, 3))
    assert bits(kernels.drawn(noise, numel, torch.device(DEVICE))) == bits(noise.draw(0, numel, torch.device("cpu")))


@needs_triton
@pytest.mark.usefixtures("everywhere")
def test_unaligned_weights() -> None:
    """A tensor that begins in the middle of 16 bytes."""
    memory = torch.randn(4000).bfloat16().to(DEVICE)
    weight, noise = memory[3:3000], GaussianNoise(Key(1, 2, 3))
    moved = Pack([weight], [2]).materialise(torch.tensor([0.1], device=DEVICE), [noise])[0][0]
    assert bits(moved) == bits(kernels.materialise(weight.clone(), torch.tensor(0.1, device=DEVICE), noise))


@needs_triton
@pytest.mark.usefixtures("everywhere")
def test_weights_that_were_moved_are_noticed() -> None:
    parameter = torch.nn.Parameter(torch.randn(8, device=DEVICE), requires_grad=False)
    one, noise = Pack([parameter], [2]), GaussianNoise(Key(1, 2, 3))
    one.materialise(torch.ones(1, device=DEVICE), [noise])
    parameter.data = parameter.data.clone()
    with pytest.raises(RuntimeError, match="the weights were moved to other memory after the optimizer was made"):
        one.materialise(torch.ones(1, device=DEVICE), [noise])


@needs_triton
@pytest.mark.usefixtures("everywhere")
def test_a_new_optimizer_finds_weights_that_were_moved() -> None:
    """What an older one has captured would go astray, so it does not."""
    net = nn.Linear(3, 3, device=DEVICE)
    space, x = zl.DenseSpace(net), torch.ones(2, 3, device=DEVICE)
    sampler = zl.ZOOptimizer(space).sampler

    def probe() -> Tensor:
        with torch.no_grad(), space.probe(sampler.directions(0, 0, 1)[0], 0.1):
            return net(x)

    before = probe()
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    with pytest.raises(RuntimeError, match="make the optimizer afterwards"):
        probe()
    zl.ZOOptimizer(space)
    assert torch.equal(probe(), before)


def test_only_known_noise_goes_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a subclass with a draw of its own, not other blocks' keys, not gaps between queries, not float64."""
    monkeypatch.setattr(pack, "FUSED_DEVICES", {"cuda", "cpu"})

    class Mine(GaussianNoise):
        pass

    one = Pack([torch.zeros(3), torch.zeros(2)], [5, 6])

    def row(kind: type[Noise], query: int = 0, block: int = 5) -> list[Noise]:
        return [kind(Key(1, block, 2, query)), kind(Key(1, 6, 2, query))]

    assert one.fusable([row(GaussianNoise), row(GaussianNoise, 1)])
    assert not one.fusable([row(Mine)])
    assert not one.fusable([row(GaussianNoise, block=7)])
    assert not one.fusable([row(GaussianNoise), row(GaussianNoise, 2)])
    assert not one.fusable([[GaussianNoise(Key(1, 5, 2)), RademacherNoise(Key(1, 6, 2))]])
    assert not Pack([torch.zeros(3).double()], [5]).fusable([[GaussianNoise(Key(1, 5, 2))]])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2100), (70, 31), (16, 256)])
def test_fold_has_the_same_bits(dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of low rank into the weights: one launch, or plain torch."""
    weight, left, basis = torch.randn(shape).to(dtype), torch.randn(shape[0], 3) * 1e-3, torch.randn(3, shape[1]).to(dtype)
    noise, shrink = GaussianNoise(Key(5, 77, 9)), torch.tensor(0.01)
    one, two = weight.clone(), weight.clone().to(DEVICE)
    plain.fold(one, left, basis, shrink, noise.key)
    monkeypatch.setattr(pack, "FUSED_DEVICES", {"cuda", "cpu"})
    kernels.fold(two, left.to(DEVICE), basis.to(DEVICE), shrink.to(DEVICE), noise, None)
    assert bits(one) == bits(two)
    exact = weight.double() * 0.99 + left.double() @ basis.double()
    close = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert bool(((one.double() - exact).abs() <= close * exact.abs() + 1e-6).all())


@needs_triton
def test_the_passes_that_a_benchmark_compares() -> None:
    """They do the same."""
    from benchmarks import deferred_pass

    weight, noise, results = torch.randn(5, 700).to(torch.bfloat16).to(DEVICE), GaussianNoise(Key(3, 77, 5)), []
    for run in (deferred_pass.one_pass, deferred_pass.two_passes):
        own, (moves, shown, clock) = weight.clone(), (torch.tensor(v, device=DEVICE) for v in ([0.01], [0.1], 5))
        made = run(deferred_pass.fused.Table([own], [77], [0], [0]), moves, shown, noise, clock)
        results.append((bits(own), bits(made.contiguous())))
    assert results[0] == results[1]

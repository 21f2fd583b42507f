"""A CUDA device has the bits of the CPU."""

from __future__ import annotations

import pytest
import reference
import torch
from nets import Net, bits, padded, state_bits, tiny

from zolightning import kernels
from zolightning.estimators import TwoPoint
from zolightning.kernels import plain
from zolightning.noise import GaussianNoise, Key, Noise, RademacherNoise, block_id, rounding_bits
from zolightning.objectives import CandidateCrossEntropy
from zolightning.optim import SGD, ZOOptimizer
from zolightning.samplers import GaussianSampler, RademacherSampler, Sampler
from zolightning.spaces import DenseSpace
from zolightning.testing import check_space

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KINDS = [GaussianNoise, RademacherNoise]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEYS = [Key(0, 1, 0), Key((1 << 64) - 1, (1 << 32) - 1, (1 << 32) - 1, 5), Key(1 << 63, block_id("b.weight"), 77)]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", KEYS)
def test_plain_noise(kind: type[Noise], key: Key) -> None:
    """Ten million Gaussians, bit for bit."""
    numel = 10_000_003
    there = torch.cat([z for _, _, z in kind(key).chunks(numel, CUDA)])
    here = torch.cat([z for _, _, z in kind(key).chunks(numel, CPU)])
    assert bits(there) == bits(here)
    assert torch.equal(rounding_bits(key, 0, 1_000_003, CUDA).cpu(), rounding_bits(key, 0, 1_000_003, CPU))


@pytest.mark.parametrize(("kind", "draw"), [(GaussianNoise, reference.gaussian), (RademacherNoise, reference.rademacher)])
def test_noise_of_the_description(kind: type[Noise], draw: reference.Draw) -> None:
    """Numpy's bits too."""
    key = Key(1 << 63, block_id("b.weight"), 77, 2)
    assert (kind(key).draw(0, 100_001, CUDA).cpu().numpy() == draw(1 << 63, "b.weight", 77, 2, 100_001)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_passes(kind: type[Noise], dtype: torch.dtype) -> None:
    """Materialise and update, ten million elements, against plain torch on the CPU."""
    pytest.importorskip("triton")
    for key in KEYS:
        w = torch.randn(10_000_003).to(dtype)
        w[:4] = torch.tensor([-0.0, 65000.0, torch.finfo(dtype).smallest_normal / 4, -1e-6]).to(dtype)
        amount = torch.tensor(1e-3)
        assert bits(kernels.materialise(w.to(CUDA), amount.to(CUDA), kind(key))) == bits(plain.materialise(w, amount, kind(key)))
        amounts, noises = torch.tensor([1e-4, -0.3]), [kind(Key(key.seed, key.block, key.step, key.query + q)) for q in range(2)]
        there = w.to(CUDA)
        kernels.update(there, amounts.to(CUDA), noises, 0.001, torch.tensor(True, device=CUDA))
        plain.update(w, amounts, noises, 0.001, torch.tensor(True))
        assert bits(there) == bits(w)
        kernels.update(there, amounts.to(CUDA), noises, 0.5, torch.tensor(False, device=CUDA))
        assert bits(there) == bits(w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.013, 0.5, 0.9])
def test_rounding_is_unbiased(dtype: torch.dtype, share: float) -> None:
    """Ten million weights of 1, shrunk by a share of the distance to their neighbour: the mean is right to four standard errors."""
    pytest.importorskip("triton")
    numel, unit = 10_000_000, torch.finfo(dtype).eps / 2  # below 1 the spacing is half of eps
    w, rate = torch.ones(numel, dtype=dtype, device=CUDA), float(torch.tensor(share * unit))
    kernels.update(w, torch.zeros(1, device=CUDA), [GaussianNoise(Key(3, 4, 5))], rate, torch.tensor(True, device=CUDA))
    exact = float(torch.tensor(1.0) - torch.tensor(rate))
    error = unit * (share * (1 - share) / numel) ** 0.5
    assert abs(float(w.double().mean()) - exact) < 4 * error + unit * 2.0**-13
    assert w.unique().numel() == 2


def test_noise_far_into_a_large_tensor() -> None:
    """Elements beyond 2**31 (a block of 4.6 GB) have the noise of their index."""
    pytest.importorskip("triton")
    numel = (1 << 31) + 4099
    if torch.cuda.mem_get_info()[0] < 5 * numel:
        pytest.skip("needs 11 GB")
    out = kernels.materialise(torch.zeros(numel, dtype=torch.bfloat16, device=CUDA), torch.tensor(1.0, device=CUDA), GaussianNoise(KEYS[2]))
    tail = GaussianNoise(KEYS[2]).draw(numel - 5000, 5000, CPU).bfloat16()
    assert torch.equal(out[-5000:].cpu(), tail)


@pytest.mark.parametrize("sampler", [GaussianSampler, RademacherSampler])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_coefficients_same_weights(dtype: torch.dtype, sampler: type[Sampler]) -> None:
    """Where the losses agree, a run on the GPU and one on the CPU end with the same bits."""
    assert run_with_given_losses(dtype, sampler(), CPU) == run_with_given_losses(dtype, sampler(), CUDA)


def run_with_given_losses(dtype: torch.dtype, sampler: Sampler, device: torch.device) -> dict[str, bytes]:
    """Ten steps whose probe losses come from a list."""
    model = Net(dtype).eval().to(device)
    optimizer = ZOOptimizer(DenseSpace(model), sampler, TwoPoint(2), lr=0.01, eps=0.1, rule=SGD(0.01))
    losses = iter(torch.linspace(0.5, 1.5, 41).tolist())  # 1 for the set-up, 4 a step

    def closure() -> torch.Tensor:
        model(torch.zeros(1, 5, device=device, dtype=dtype))
        return torch.tensor(next(losses), device=device)

    for _ in range(10):
        optimizer.step(closure)
    return state_bits(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_common(dtype: torch.dtype) -> None:
    """The space's common test on the device."""
    model = Net(dtype).eval().to(CUDA)
    x = torch.randn(6, 5, device=CUDA).to(dtype)
    check_space(DenseSpace(model), lambda: model(x).float().square().mean(), eps=0.1)


def test_fused_attention_dropout_is_refused() -> None:
    """The kernel that draws its own mask is seen too."""
    model = tiny("llama", torch.bfloat16).to(CUDA).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = torch.randint(3, 60, (2, 8), device=CUDA)
    optimizer = ZOOptimizer(DenseSpace(model), lr=1e-3, eps=1e-2)
    with pytest.raises(ValueError, match="draws dropout masks"):
        optimizer.step(lambda: model(input_ids=ids, use_cache=False).logits.float().square().mean())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_repeats_bit_for_bit(dtype: torch.dtype) -> None:
    """A tiny language model, five steps, twice."""
    runs = []
    for _ in range(2):
        model = tiny("llama", dtype).to(CUDA)
        batch = {**padded([[5, 9, 3], [7, 8]]), "candidates": torch.tensor([[10, 11]] * 2), "label": torch.tensor([0, 1])}
        bound = CandidateCrossEntropy().on(model, {key: value.to(CUDA) for key, value in batch.items()})
        optimizer = ZOOptimizer(DenseSpace(model), lr=1e-2, eps=1e-2)
        for _ in range(5):
            optimizer.step(bound)
        runs.append(state_bits(model))
    assert runs[0] == runs[1]


def test_tf32_is_off_in_probes_and_back_afterwards() -> None:
    """By what a product gives, whatever the flags are called: float32 to 1e-6 inside, TF32's 1e-4 before and after."""
    model = Net().eval().to(CUDA)
    a, b = torch.randn(512, 512, device=CUDA), torch.randn(512, 512, device=CUDA)
    exact, errors = (a.double() @ b.double()), []

    def error() -> float:
        return float(((a @ b).double() - exact).norm() / exact.norm())

    def closure() -> torch.Tensor:
        errors.append(error())
        return model(torch.ones(1, 5, device=CUDA)).sum()

    torch.set_float32_matmul_precision("high")
    try:
        before = error()
        ZOOptimizer(DenseSpace(model), lr=1e-3, eps=1e-2).step(closure)
        after = error()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert before == after > 1e-5
    assert max(errors) < 2e-6

"""The kernels' square root: every number that it may meet."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
noise = pytest.importorskip("zolightning.kernels.noise")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
root = noise.root


@triton.jit
def _roots(out, values, numel, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, root(tl.load(values + at, mask=at < numel, other=1.0)), mask=at < numel)


def test_all_roots_are_rounded_correctly() -> None:
    """-2 log(u) is 0, or lies between 2**-24 and 64: a quarter of a billion numbers."""
    first, last, step = 0x33800000, 0x42800001, 1 << 24
    for start in range(first, last, step):
        values = torch.arange(start, min(start + step, last), dtype=torch.int32, device="cuda").view(torch.float32)
        out = torch.empty_like(values)
        _roots[(triton.cdiv(values.numel(), 1024),)](out, values, values.numel(), SIZE=1024, enable_fp_fusion=False)
        assert torch.equal(out, values.double().sqrt().float())
    zeros, out = torch.tensor([0.0, -0.0], device="cuda"), torch.ones(2, device="cuda")
    _roots[(1,)](out, zeros, 2, SIZE=1024, enable_fp_fusion=False)
    assert torch.equal(out.view(torch.int32), zeros.view(torch.int32))

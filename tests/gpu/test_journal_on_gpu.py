"""The journal on a GPU: rows of captured steps, and weights that a CPU rebuilds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import VOCABULARY, state_bits, tiny
from torch import nn

import zolightning as zl
from zolightning.journal import Recorder, read
from zolightning.objectives.base import BoundObjective
from zolightning.policies import FeaturePolicy, PertNN
from zolightning.samplers import Sampler

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
SAMPLERS: dict[str, Any] = {
    "gaussian": zl.GaussianSampler,
    "rademacher": zl.RademacherSampler,
    "low_rank": lambda: zl.LowRankSampler(2, 5),
    "paper": lambda: zl.PolicySampler(PertNN(), refresh_every=3),
    "policy": lambda: zl.PolicySampler(FeaturePolicy(hidden=4), zl.RademacherSampler()),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bound(model: nn.Module, number: int) -> BoundObjective:
    """A batch of four rows, 16 or 32 tokens wide."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, VOCABULARY, (4, 16 * (1 + number % 2)), generator=generator)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "label": torch.arange(4) % 2,
        "candidates": torch.tensor([[5, 6]] * 4),
    }
    return zl.CandidateCrossEntropy().on(model, {name: value.to(CUDA) for name, value in batch.items()})


def run(
    folder: Path, sampler: Sampler, dtype: torch.dtype, capture: bool, queries: int = 1, steps: int = 12
) -> tuple[zl.ZOOptimizer, Path]:
    """A run with a rate that changes and one step whose loss is not finite."""
    model = tiny("llama", dtype, tied=True).to(CUDA)
    optimizer = zl.ZOOptimizer(
        zl.DenseSpace(model), sampler, zl.TwoPoint(queries), lr=1e-2, eps=1e-2, pair=True, capture=capture, compile=False
    )
    path = folder / f"{capture}.zo"
    recorder = Recorder(path, optimizer, "tiny")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        weight = model.model.norm.weight
        kept = weight[0].clone()
        if step == 5:
            with torch.no_grad():
                weight[0] = float("nan")
        optimizer.step(bound(model, step))
        if step == 5:
            with torch.no_grad():
                weight[0] = kept
        if step % 5 == 4:
            recorder.drain()
    recorder.drain()
    recorder.close()
    assert optimizer._form.captured == capture
    return optimizer, path


@pytest.mark.parametrize("kind", SAMPLERS)
def test_captured_rows_are_eager_ones(kind: str, tmp_path: Path) -> None:
    one, two = (run(tmp_path, SAMPLERS[kind](), torch.bfloat16, capture)[1] for capture in (False, True))
    rows = [[entry.row for entry in read(path).entries] for path in (one, two)]
    assert len(rows[0]) == 12
    for eager, captured in zip(*rows, strict=True):
        assert str(eager[:5]) == str(captured[:5])
        assert torch.equal(eager.scales, captured.scales)
    assert [row.valid for row in rows[1]] == [step != 5 for step in range(12)]


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_on_the_gpu_replayed_on_the_cpu(dtype: torch.dtype, kind: str, queries: int, tmp_path: Path) -> None:
    """And on the GPU: the same bits."""
    optimizer, path = run(tmp_path, SAMPLERS[kind](), dtype, True, queries)
    trained = state_bits(optimizer.space.model)
    for device in ("cpu", "cuda"):
        model = tiny("llama", dtype, tied=True).to(device)
        before = state_bits(model)
        assert zl.replay(path, model) == 12
        assert state_bits(model) == trained != before


@pytest.mark.parametrize("kind", SAMPLERS)
def test_recorded_steps_repeat_and_go_on_captured(kind: str, tmp_path: Path) -> None:
    """Eight steps from the record, then captured ones: the bits of twelve captured ones."""
    whole, path = run(tmp_path, SAMPLERS[kind](), torch.bfloat16, True)
    rows = [entry.row for entry in read(path).entries[:8]]
    model = tiny("llama", torch.bfloat16, tied=True).to(CUDA)
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "pair": True, "capture": True, "compile": False}
    optimizer = zl.ZOOptimizer(zl.DenseSpace(model), SAMPLERS[kind](), **options)
    optimizer.repeat(rows)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step(bound(model, step))
    assert (optimizer._form.captured, optimizer.skipped) == (True, 1)
    assert state_bits(model) == state_bits(whole.space.model)


def test_writing_rows_waits_for_nothing() -> None:
    """A hundred captured steps with every wait an error; then the rows are all there."""
    model = tiny("llama", torch.bfloat16).to(CUDA)
    optimizer = zl.ZOOptimizer(zl.DenseSpace(model), lr=1e-3, eps=1e-2, compile=False)
    work = bound(model, 0)
    optimizer.step(work)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            optimizer.step(work)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [row.step for row in optimizer.history.drain(optimizer.steps)] == list(range(101))


def test_the_ring_empties_itself(tmp_path: Path) -> None:
    """More captured steps than it holds, without a drain between."""
    model = tiny("llama", torch.bfloat16).to(CUDA)
    optimizer = zl.ZOOptimizer(zl.DenseSpace(model), zl.RademacherSampler(), lr=1e-3, eps=1e-2, compile=False)
    recorder = Recorder(tmp_path / "journal.zo", optimizer)
    work = bound(model, 0)
    for _ in range(2500):
        optimizer.step(work)
    recorder.drain()
    assert read(tmp_path / "journal.zo").steps == 2500
    fresh = tiny("llama", torch.bfloat16)
    zl.replay(tmp_path / "journal.zo", fresh, until_step=50)

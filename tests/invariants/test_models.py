"""Every block of every kind of model is really perturbed, or named; no model has a special case."""

from __future__ import annotations

import pytest
import torch
from nets import CONFIGS, lm_closure, state_bits, tiny

from zolightning.optim import ZOOptimizer
from zolightning.samplers import Direction, GaussianSampler
from zolightning.spaces import DenseSpace
from zolightning.testing import check_space

# The softmax over keys does not see what is added to all of them alike, unless positions rotate the keys.
INVISIBLE = {"opt": "k_proj.bias"}
DTYPE = {"mixtral": torch.float32}  # torch's grouped matrix product knows no float64
MODELS = [(family, tied) for family in CONFIGS for tied in (False, True)]


@pytest.mark.parametrize(("family", "tied"), MODELS, ids=[f"{family}-{'tied' if tied else 'untied'}" for family, tied in MODELS])
def test_every_block_moves_the_loss(family: str, tied: bool) -> None:
    """float64 where the model runs in it, so that no response drowns in rounding."""
    model = tiny(family, DTYPE.get(family, torch.float64), tied)
    space, closure, sampler = DenseSpace(model), lm_closure(model), GaussianSampler()
    assert sum(b.numel for b in space.blocks) == sum(p.numel() for p in model.parameters())
    assert any("lm_head" in block.name for block in space.blocks) != tied
    sampler.bind(space)
    before, silent = state_bits(model), []
    with torch.no_grad():
        report = space.verify(closure, sampler.directions(0, 0, 1)[0], 0.05)
        plain = closure()
        for index, block in enumerate(space.blocks):
            scales = torch.zeros(len(space.blocks))
            scales[index] = 1.0
            with space.probe(Direction(sampler, 0, 0, 0, scales), 0.05):
                if abs(float(closure() - plain)) <= 1e-14:
                    silent.append(block.name)
    assert report.unread == []
    assert [name for name in silent if not name.endswith(INVISIBLE.get(family, "nothing"))] == []
    assert state_bits(model) == before


@pytest.mark.parametrize("family", ["opt", "mixtral", "lfm2"])
def test_common(family: str) -> None:
    """The common test on a model with invisible biases, one with fused experts and one that reads its children's weights."""
    model = tiny(family, DTYPE.get(family, torch.float64))
    check_space(DenseSpace(model), lm_closure(model), eps=0.05)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_in_16_bits(family: str, dtype: torch.dtype) -> None:
    """Three steps: finite, every block moved, buffers untouched."""
    model = tiny(family, dtype)
    before = state_bits(model)
    optimizer = ZOOptimizer(DenseSpace(model), lr=1e-3, eps=1e-2)
    for _ in range(3):
        assert bool(torch.isfinite(optimizer.step(lm_closure(model))))
    after, moving = state_bits(model), {block.name for block in optimizer.space.blocks}
    assert {name for name in after if after[name] != before[name]} == moving

"""Quantised models on a GPU: captured steps have the bits of launches, the base keeps its own, and a second run goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import bits
from quantised import KINDS, packed_bits, scale_bits
from runs import film_data, make_module, make_trainer
from test_graphs import bound

import zolightning as zl
from zolightning.models import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SPACES: dict[str, Any] = {
    "lora": zl.AdapterSpace,
    "prefix": partial(zl.AdapterSpace, kind="prefix"),
    "bank": partial(zl.LowRankSpace, rank=2, slots=2, refresh=3),
    "scales": zl.QuantScaleSpace,
    "rest": zl.DenseSpace,
}


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
@pytest.mark.parametrize("name", SPACES)
def test_a_graph_has_the_bits_of_launches(tiny_folder: str, kind: str, name: str) -> None:
    """Six steps over two widths; what is not meant to move keeps its bits."""
    ends = []
    for capture in (False, True):
        model = load_model(tiny_folder, "bfloat16", "cuda", **KINDS[kind])
        before = packed_bits(model), scale_bits(model)
        space = SPACES[name](model)
        optimizer = zl.ZOOptimizer(space, lr=1e-3, eps=1e-2, capture=capture, pair=False, compile=False)
        for step in range(6):
            optimizer.step(bound(space.model, step))
        assert optimizer._form.captured == capture
        assert optimizer.skipped == 0
        assert packed_bits(model) == before[0]
        assert (scale_bits(model) == before[1]) == (name != "scales")
        ends.append({block.name: bits(block.tensor) for block in space.blocks})
    assert ends[0] == ends[1]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["lora", "bank", "scales"])
def test_the_fastest_form_is_the_same_step(tiny_folder: str, kind: str, name: str) -> None:
    """Whatever form is chosen, its losses are those of plain probes."""
    losses = []
    for options in ({}, {"capture": False, "pair": False, "compile": False}):
        space = SPACES[name](load_model(tiny_folder, "float32", "cuda", **KINDS[kind]))
        optimizer = zl.ZOOptimizer(space, lr=1e-3, eps=5e-2, **options)
        optimizer.step(bound(space.model, 0))
        assert optimizer.losses is not None
        losses.append(optimizer.losses)
    assert torch.allclose(*losses, atol=1e-2)


@pytest.mark.parametrize(
    "options", [{"space": zl.QuantScaleSpace, **KINDS["nf4 double"]}, {"space": zl.QuantScaleSpace, **KINDS["int8"]}, {}], ids=str
)
def test_a_second_run(tiny_folder: str, tmp_path: Path, options: dict[str, Any]) -> None:
    """In between Lightning takes the model to the CPU. What a checkpoint holds is then put where the model computes."""
    module = make_module(tiny_folder, lr=1e-2, **options)
    trainer = make_trainer(tmp_path, 2, accelerator="gpu", devices=1)
    trainer.fit(module, film_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    once = {block.name: bits(block.tensor) for block in module.space.blocks}
    make_trainer(tmp_path, 3, accelerator="gpu", devices=1).fit(module, film_data(tmp_path))
    twice = {block.name: bits(block.tensor) for block in module.space.blocks}
    assert not set(once.values()) & set(twice.values())
    make_trainer(tmp_path, accelerator="gpu", devices=1).validate(
        module, film_data(tmp_path), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False
    )
    assert {block.name: bits(block.tensor) for block in module.space.blocks} == once
    if options:
        shown = {f"model.layers.{name}.scales": value for name, value in scale_bits(module.language_model).items()}
        assert shown == once

"""Quantised models through the Trainer: checkpoints hold what moves, and a resumed run has the same bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import bits
from quantised import KINDS, packed_bits, quantised, scale_bits
from runs import film_data, make_module, make_trainer

import zolightning as zl

SPACES: dict[str, Any] = {
    "lora": zl.AdapterSpace,
    "bank": partial(zl.LowRankSpace, slots=2, refresh=2),  # five steps: slots 0, 0, 1, 1, 0
    "prefix": partial(zl.AdapterSpace, kind="prefix"),
    "scales": zl.QuantScaleSpace,
    "rest": zl.DenseSpace,
    "union": partial(zl.UnionSpace, spaces=[zl.QuantScaleSpace, zl.AdapterSpace, partial(zl.DenseSpace, include=["*norm*"])]),
}


def fit(pretrained: str, folder: Path, steps: int, ckpt: str | None = None, **options: Any) -> tuple[Any, zl.ZOFinetuneModule]:
    """Train and save ``a.ckpt``."""
    module, trainer = make_module(pretrained, **options), make_trainer(folder, steps)
    trainer.fit(module, film_data(folder), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / "a.ckpt")
    return torch.load(folder / "a.ckpt", weights_only=True), module


def moved(module: zl.ZOModule) -> dict[str, bytes]:
    return {block.name: bits(block.tensor) for block in module.space.blocks}


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
@pytest.mark.parametrize("space", SPACES)
def test_resumes_to_the_same_bits(tiny_folder: str, tmp_path: Path, kind: str, space: str) -> None:
    options = {**KINDS[kind], "space": SPACES[space], "dtype": "bfloat16"}
    _, whole = fit(tiny_folder, tmp_path, 5, **options)
    checkpoint, half = fit(tiny_folder, tmp_path, 2, **options)
    assert set(checkpoint["state_dict"]) == {f"model.{block.name}" for block in half.space.blocks}
    _, rest = fit(tiny_folder, tmp_path, 5, str(tmp_path / "a.ckpt"), **options)
    assert moved(rest) == moved(whole) != moved(half)
    base = quantised(tiny_folder, kind, "bfloat16")
    assert packed_bits(whole.language_model) == packed_bits(base)
    if space in ("lora", "bank", "prefix", "rest"):
        assert scale_bits(whole.language_model) == scale_bits(base)


def test_a_second_run_in_one_process(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning takes the model to the CPU and back in between; here the scales get other memory as they do then."""
    from bitsandbytes.functional import QuantState

    monkeypatch.setattr(QuantState, "to", lambda state, device: setattr(state, "absmax", state.absmax.clone()))
    options = {**KINDS["nf4 double"], "space": zl.QuantScaleSpace, "lr": 1e-2}
    _, module = fit(tiny_folder, tmp_path, 2, **options)
    once = scale_bits(module.language_model)
    assert once == {block.name.partition("layers.")[2].rpartition(".")[0]: bits(block.tensor) for block in module.space.blocks}
    make_trainer(tmp_path, 3).fit(module, film_data(tmp_path))
    twice = scale_bits(module.language_model)
    assert not set(once.values()) & set(twice.values())
    assert twice == {block.name.partition("layers.")[2].rpartition(".")[0]: bits(block.tensor) for block in module.space.blocks}
    make_trainer(tmp_path).validate(module, film_data(tmp_path), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
    assert scale_bits(module.language_model) == once


@pytest.mark.parametrize("space", ["prefix", "scales"])
def test_the_base_is_reloaded(tiny_folder: str, tmp_path: Path, space: str) -> None:
    """To go back in a run the blocks get the values again that they have on the quantised base."""
    options = {**KINDS["nf4 double"], "space": SPACES[space], "lr": 1e-2}
    _, module = fit(tiny_folder, tmp_path, 2, **options)
    fresh = make_module(tiny_folder, **options)
    fresh.configure_model()
    assert moved(module) != moved(fresh)
    module.reload_base()
    assert moved(module) == moved(fresh)


def test_validation_of_a_checkpoint(tiny_folder: str, tmp_path: Path) -> None:
    """Scales are no parameters; the figures are those of the trained ones all the same."""
    options = {**KINDS["nf4"], "space": zl.QuantScaleSpace, "lr": 1e-2}
    _, module = fit(tiny_folder, tmp_path, 4, **options)
    trained = make_trainer(tmp_path).validate(module, film_data(tmp_path), verbose=False)
    fresh = make_module(tiny_folder, **options)
    base = make_trainer(tmp_path).validate(fresh, film_data(tmp_path), verbose=False)
    again = make_module(tiny_folder, **options)
    loaded = make_trainer(tmp_path).validate(again, film_data(tmp_path), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
    assert loaded == trained != base


def test_a_checkpoint_of_another_quantisation(tiny_folder: str, tmp_path: Path) -> None:
    fit(tiny_folder, tmp_path, 1, quantization="nf4", space=zl.QuantScaleSpace)
    with pytest.raises(
        ValueError,
        match=r"^a checkpoint of another model or space: block 'model\..*q_proj.scales' is float32\[16\] there and float32\[32\] here$",
    ):
        fit(tiny_folder, tmp_path, 2, str(tmp_path / "a.ckpt"), quantization="int8", space=zl.QuantScaleSpace)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (partial(zl.LowRankSpace, seed=1), zl.LowRankSpace, "seed=1, this one seed=0"),
        (zl.LowRankSpace, partial(zl.LowRankSpace, refresh=7), "refresh=100, this one refresh=7"),
        (partial(zl.AdapterSpace, alpha=8.0), zl.AdapterSpace, "alpha=8.0, this one alpha=16.0"),
    ],
)
def test_a_checkpoint_of_another_adapter(tiny_folder: str, tmp_path: Path, before: Any, after: Any, text: str) -> None:
    """The same blocks behind another A or factor are another model."""
    fit(tiny_folder, tmp_path, 1, space=partial(zl.UnionSpace, spaces=[before]))
    with pytest.raises(ValueError, match=f"^the checkpoint's space has {text}$"):
        fit(tiny_folder, tmp_path, 2, str(tmp_path / "a.ckpt"), space=partial(zl.UnionSpace, spaces=[after]))

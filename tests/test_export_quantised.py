"""Export from a quantised base: an adapter, a packed model, ordinary weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import bits, lm_closure
from quantised import KINDS, packed_bits, quantised, scale_bits
from runs import make_module

import zolightning as zl
from zolightning.export import export_model, merged
from zolightning.models import load_model, settle


def trained(folder: str, kind: str | None, space: Any) -> Any:
    """A module whose blocks have moved."""
    module = make_module(folder, space=space, **(KINDS[kind] if kind else {}))
    module.configure_model()
    module.model.eval()
    sampler = zl.GaussianSampler()
    sampler.bind(module.space)
    with torch.no_grad():
        module.space.move(sampler.directions(0, 0, 1), torch.tensor([0.1]), 0.0, torch.tensor(True))
    return module


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return float(lm_closure(model.eval())())


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def test_folders_of_others_are_left_alone(tiny_folder: str, tmp_path: Path) -> None:
    """A folder with files may only be one of an earlier export."""
    module = trained(tiny_folder, "nf4", zl.AdapterSpace)
    export_model(module, None, tmp_path / "mine")
    export_model(module, None, tmp_path / "mine")
    (tmp_path / "README.md").write_text("# Notes")
    with pytest.raises(ValueError, match=r"^folder '.*' holds files that no export has written: name a new one$"):
        export_model(module, None, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "mine"]


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_an_adapter(tiny_folder: str, tmp_path: Path, kind: Any) -> None:
    """peft puts it on the same base again."""
    from peft import PeftModel

    module = trained(tiny_folder, "nf4", partial(zl.AdapterSpace, kind=kind))
    export_model(module, None, tmp_path)
    base = quantised(tiny_folder, "nf4")
    plain = loss_of(base)
    again = PeftModel.from_pretrained(base, tmp_path)
    names = {block.name for block in module.space.blocks}
    assert {name: bits(value) for name, value in again.named_parameters() if name in names} == {
        block.name: bits(block.tensor) for block in module.space.blocks
    }
    assert not (tmp_path / "model.safetensors").exists()
    if kind != "prefix":
        assert loss_of(again) == loss_of(module.model) != plain


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_bank(tiny_folder: str, tmp_path: Path, kind: str) -> None:
    """Its slots are one adapter: plain peft finds the same logits on the same base, and merged weights nearly so."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module = trained(tiny_folder, kind, partial(zl.LowRankSpace, rank=3, slots=2))
    expected, base = logits_of(module.model), quantised(tiny_folder, kind)
    plain = logits_of(base)
    export_model(module, None, tmp_path / "adapter")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits_of(again), expected)
    assert (again.peft_config["default"].r, again.peft_config["default"].lora_alpha) == (6, 6)
    export_model(module, None, tmp_path / "model", merge=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    # Kernels of int8 round the activations too.
    assert float((logits_of(whole) - expected).norm() / (expected - plain).norm()) < (0.05 if kind == "int8" else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model(tiny_folder: str, tmp_path: Path, kind: str) -> None:
    """Moved scales are in the files."""
    from transformers import AutoModelForCausalLM

    module = trained(tiny_folder, kind, zl.QuantScaleSpace)
    export_model(module, None, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map={"": "cpu"})
    assert packed_bits(again) == packed_bits(module.model)
    assert scale_bits(load_model(str(tmp_path), "float32")) == scale_bits(module.model)
    settle(again, torch.float32)  # a CPU with AVX512-BF16 would pack the weights anew, which it cannot do for 32 columns
    assert loss_of(module.model) == pytest.approx(loss_of(again), abs=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_ordinary_weights(tiny_folder: str, tmp_path: Path, kind: str | None) -> None:
    """Unpacked and merged it is the model that was trained, up to rounding."""
    from transformers import AutoModelForCausalLM

    norms = partial(zl.DenseSpace, include=["*norm*"])
    spaces = [*([zl.QuantScaleSpace] if kind else []), norms, zl.AdapterSpace]
    module = trained(tiny_folder, kind, partial(zl.UnionSpace, spaces=spaces))
    expected = logits_of(module.model)
    change = (expected - logits_of(quantised(tiny_folder, kind) if kind else load_model(tiny_folder, "float32"))).norm()
    with pytest.raises(ValueError, match=r"^an adapter's files cannot hold the other weights that this space moves: use --merge=true$"):
        export_model(module, None, tmp_path / "adapter")
    export_model(module, None, tmp_path / "model", merge=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert not any("lora" in name for name, _ in again.named_parameters())
    # Kernels of int8 round the activations too.
    assert float((logits_of(again) - expected).norm() / change) < (0.05 if kind == "int8" else 1e-4)


@pytest.mark.parametrize(("kind", "again"), [("nf4 double", "nf4"), ("int8", "fp4"), (None, "int8")])
def test_quantised_again(tiny_folder: str, tmp_path: Path, kind: str | None, again: Any) -> None:
    """What was merged, packed: transformers finds it quantised, and only that is in the folder."""
    from transformers import AutoModelForCausalLM

    export_model(trained(tiny_folder, kind, zl.AdapterSpace), None, tmp_path / "whole", merge=True)
    export_model(trained(tiny_folder, kind, zl.AdapterSpace), None, tmp_path / "packed", requantize=again)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32, device_map={"": "cpu"})
    assert found.is_quantized
    double = again == "nf4"
    expected = load_model(str(tmp_path / "whole"), "float32", quantization=again, double_quantization=double)
    ours = load_model(str(tmp_path / "packed"), "float32")
    assert packed_bits(found) == packed_bits(ours) == packed_bits(expected)
    assert scale_bits(ours) == scale_bits(expected)
    assert loss_of(ours) == loss_of(expected) != loss_of(load_model(tiny_folder, "float32", quantization=again))
    assert not [path for path in (tmp_path / "packed").iterdir() if path.is_dir()]
    export_model(trained(str(tmp_path / "packed"), None, zl.AdapterSpace), None, tmp_path / "more", requantize=again)
    assert packed_bits(load_model(str(tmp_path / "more"))) != packed_bits(ours)


def test_a_prefix_is_no_change_of_weights(tiny_folder: str) -> None:
    with pytest.raises(ValueError, match=r"^a prefix cannot be merged into the weights: export without --merge$"):
        merged(zl.AdapterSpace(quantised(tiny_folder, "nf4"), "prefix").model)

"""Loading onto a bitsandbytes base: what is stored how, and that nothing changes while it is used."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import lm_closure
from quantised import KINDS, packed_bits, quantised, scale_bits

from zolightning.models import load_model, weight_bytes


def bare(folder: str, kind: str) -> Any:
    """As transformers loads it, without our settling."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=kind != "int8", load_in_8bit=kind == "int8", llm_int8_threshold=0.0, bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_type=kind.split()[0] if kind != "int8" else "nf4", bnb_4bit_use_double_quant="double" in kind,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}).train()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_how(tiny_folder: str, kind: str) -> None:
    """The linear maps of the layers are packed; all else has the dtype asked for; the bits are those of bitsandbytes."""
    model = quantised(tiny_folder, kind, "bfloat16")
    packed = torch.int8 if kind == "int8" else torch.uint8
    maps = {name: p for name, p in model.named_parameters() if "proj" in name}
    assert len(maps) == 14
    assert {p.dtype for p in maps.values()} == {packed}
    assert {p.dtype for name, p in model.named_parameters() if name not in maps} == {torch.bfloat16}
    assert not model.training
    exact = load_model(tiny_folder, "float32")
    small = quantised(tiny_folder, kind)
    assert packed_bits(small) == packed_bits(bare(tiny_folder, kind))
    with torch.no_grad():
        ours, theirs = float(lm_closure(small)()), float(lm_closure(exact)())
    assert 0 < abs(ours - theirs) < 0.05 * theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_forwards_change_nothing(tiny_folder: str, kind: str, dtype: str) -> None:
    """Neither packing nor scales, and not where they are."""
    model = quantised(tiny_folder, kind, dtype)
    before = packed_bits(model), scale_bits(model)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.no_grad():
        losses = {float(lm_closure(model)()) for _ in range(3)}
    assert len(losses) == 1
    assert (packed_bits(model), scale_bits(model)) == before
    assert len(before[0]) == len(before[1]) == 14
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


def test_the_state_of_int8_layers_travels(tiny_folder: str) -> None:
    """bitsandbytes would hold the weight of the old device too; here the weights get other memory, as they do on another device."""
    model = quantised(tiny_folder, "int8")
    layer = model.model.layers[0].mlp.up_proj
    scales, before = layer.state.SCB, (packed_bits(model), scale_bits(model))
    old = layer.weight.data_ptr()
    model._apply(lambda tensor: tensor.clone())
    assert layer.state.CB.data_ptr() == layer.weight.data_ptr() != old
    assert layer.state.SCB is scales
    with torch.no_grad():
        assert float(lm_closure(model)()) == float(lm_closure(quantised(tiny_folder, "int8"))())
    assert (packed_bits(model), scale_bits(model)) == before


def test_no_repacking_on_any_processor(tiny_folder: str) -> None:
    """Processors with AVX512-BF16 would pack 4-bit weights anew at the first forward; this one may not be one of them."""
    model = quantised(tiny_folder, "nf4")
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert flags == [False] * 14


def test_silent(tiny_folder: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """A line for each cast of an input would be thousands."""
    with torch.no_grad():
        lm_closure(quantised(tiny_folder, "int8"))()
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quantization": "int3"}, "quantization='int3' must be one of nf4, fp4, int8"),
        ({"quantization": "int8", "double_quantization": True}, "double_quantization=true is for nf4 and fp4; the scales of int8 are few"),
        ({"double_quantization": True}, "double_quantization=true needs quantization: nf4 or fp4"),
    ],
)
def test_refusals(tiny_folder: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        load_model(tiny_folder, "float32", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_quantised_already(tiny_folder: str, tmp_path: Path, kind: str) -> None:
    """As anyone may have written them, with another type to compute in and int8 outliers: they become what ours are."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=kind != "int8", load_in_8bit=kind == "int8", bnb_4bit_use_double_quant="double" in kind,
        bnb_4bit_quant_type=kind.split()[0] if kind != "int8" else "nf4",
    )  # fmt: skip
    options: dict[str, Any] = {"dtype": torch.bfloat16, "quantization_config": config, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(tiny_folder, **options).save_pretrained(tmp_path)
    plain, ours = load_model(str(tmp_path), "bfloat16"), quantised(tiny_folder, kind, "bfloat16")
    assert (packed_bits(plain), scale_bits(plain)) == (packed_bits(ours), scale_bits(ours))
    assert weight_bytes(plain) == weight_bytes(ours)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in plain.modules())
    assert all(module.state.threshold == 0 for module in plain.modules() if hasattr(module, "state"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert packed_bits(load_model(str(tmp_path), "bfloat16", **KINDS[kind])) == packed_bits(ours)
    plain.save_pretrained(tmp_path / "again")
    assert packed_bits(load_model(str(tmp_path / "again"), "bfloat16")) == packed_bits(ours)
    other = "nf4" if kind == "int8" else "int8"
    shown = kind.replace("nf4 double", "nf4 with quantised scales")
    with pytest.raises(ValueError, match=f"^'.*' is quantised already, as {shown}: quantization={other} needs files that are not$"):
        load_model(str(tmp_path), "bfloat16", quantization=other)


def test_files_quantised_by_others(tiny_folder: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ValueError, match=r"^'.*' is quantised by gptq; only bitsandbytes' nf4, fp4, int8 are known$"):
        load_model(str(tmp_path))


def test_the_scales_count_as_weights(tiny_folder: str) -> None:
    """A scale of 4 bytes for 64 packed weights, of 1 with double quantisation, of 4 for each row in 8 bits."""
    rest = sum(p.numel() * p.element_size() for p in quantised(tiny_folder, "nf4").parameters() if p.is_floating_point())
    packed = sum(len(value) for value in packed_bits(quantised(tiny_folder, "int8")).values())
    assert weight_bytes(quantised(tiny_folder, "nf4")) == rest + packed // 2 + packed // 64 * 4
    assert weight_bytes(quantised(tiny_folder, "nf4 double")) == rest + packed // 2 + packed // 64 + 14 * 4
    assert weight_bytes(quantised(tiny_folder, "int8")) == rest + packed + 2 * (4 * 32 - 2 * 16 + 2 * 64 + 32) * 4


def test_missing_bitsandbytes(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"^quantization=nf4 needs bitsandbytes: pip install zolightning\[quant\]$"):
        load_model(tiny_folder, "float32", quantization="nf4")
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_8bit": True}}))
    with pytest.raises(ValueError, match=r"^'.*', quantised as int8, needs bitsandbytes: pip install zolightning\[quant\]$"):
        load_model(str(tmp_path))

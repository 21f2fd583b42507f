"""Loading onto a bitsandbytes base: what is stored how, and that nothing changes while it is used."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from nets import lm_closure
from quantised import KINDS, packed_bits, quantised, scale_bits

from zolightning.models import load_model


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


def test_missing_bitsandbytes(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"^quantization=nf4 needs bitsandbytes: pip install zolightning\[quant\]$"):
        load_model(tiny_folder, "float32", quantization="nf4")

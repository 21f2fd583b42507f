"""Quantised models from the command line: a union of spaces from YAML, end to end; silent, and one line where something is wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Run

UNION = {
    "class_path": "zolightning.UnionSpace",
    "init_args": {
        "spaces": [
            {"class_path": "zolightning.QuantScaleSpace"},
            {"class_path": "zolightning.DenseSpace", "init_args": {"include": ["*norm*"]}},
            {"class_path": "zolightning.AdapterSpace", "init_args": {"rank": 2}},
        ]
    },
}


def test_end_to_end(run: Run, main: Callable[..., Any], options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fit says nothing on stderr; validate finds the figures of the run's end; export merges all and packs it again."""
    from transformers import AutoModelForCausalLM

    (tmp_path / "union.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"space": UNION}}}))
    small = [*options, "--config=union.yaml", "--model.quantization=nf4", "--model.double_quantization=true", "--trainer.max_steps=2"]
    done = run("fit", *small)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^moves +27 blocks", done.stdout, re.M)
    after = [line.split()[-2] for line in done.stdout.splitlines() if line.startswith("loss (nats)")]
    main("validate", *small, "--ckpt_path=last", "--trainer.limit_val_batches=1.0")
    assert [line.split()[-2] for line in capsys.readouterr().out.splitlines() if line.startswith("loss (nats)")] == after
    main("export", *small, "--ckpt_path=last", "--output=out", "--requantize=int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.int8}


def test_one_line_without_bitsandbytes(options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from zolightning.cli import main

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("sys.argv", ["zolightning"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options, "--model.quantization=nf4"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: quantization=nf4 needs bitsandbytes: pip install zolightning[quant]"

"""From statistics to the choice and on: what is done is not done again, and no other task is looked at before the choice is frozen."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import QUESTIONS, write_rows

from benchmarks import choose, derive, ledger, policy_pipeline
from benchmarks.plan import Plan
from benchmarks.runs import FIELDS, Run
from zolightning.models import load_model


def rows(run: Run, loss: float) -> list[ledger.Row]:
    """Start and end of a run with a raw loss, 0.01 below it when corrected."""
    row = {name: getattr(run, name) for name in FIELDS} | {"metric": "accuracy", "accuracy": 0.5, "constant_loss": 0.7, "wall": 1.0}
    row |= {"machine": "x", "commit": "c", "torch": "2", "loss": loss, "loss_corrected": loss - 0.01}
    return [{**row, "forwards": forwards, "final": forwards > 0} for forwards in (0, run.forwards_asked)]


def test_the_candidate_with_the_best_worst_case_is_chosen(tmp_path: Path) -> None:
    """Not the one that wins most over uniform, nor the one that has not run everywhere; tasks without headroom do not count."""
    methods: dict[str, Any] = {name: {"build": "x"} for name in ("uniform", "half")}
    methods |= {name: {"build": "x", "candidate": True} for name in ("bold", "even", "absent")}
    config = {"ledger": str(tmp_path / "l.jsonl"), "models": {"m": "m"}, "tasks": {"a": {}, "b": {}, "none": {}},
              "methods": {"adam": {"build": "x", "first": True}, **methods}, "search": {"seed": 9, "forwards": 1, "lrs": [1.0]},
              "final": {"seeds": [0], "forwards": 4000}}  # fmt: skip
    losses = {"adam": (0.4, 0.4, 0.69), "uniform": (0.7, 0.7, 0.7), "half": (0.5, 0.6, 0.7), "bold": (0.4, 0.7, 0.1),
              "even": (0.49, 0.58, 0.9), "absent": (0.1, math.inf, 0.1)}  # fmt: skip
    for method, values in losses.items():
        for task, loss in zip(config["tasks"], values, strict=True):
            if math.isfinite(loss):
                ledger.append(tmp_path / "l.jsonl", *rows(Plan(config).run("final", (method, "m", task), 0, 1.0), loss))
    found = choose.scores(config, ledger.read(tmp_path / "l.jsonl"))
    assert set(found) == {"bold", "even"}
    assert min(found["even"].values()) == pytest.approx((0.01 / 0.5 + 0.02 / 0.6) / 2)
    assert max(found, key=lambda name: min(found[name].values())) == "even"


def test_derive(tmp_path: Path, tiny_folder: str) -> None:
    """Another checkpoint than the base, the same one each time, with a tokenizer."""
    file = write_rows(tmp_path / "rows.jsonl", QUESTIONS * 2)
    common = [f"--pretrained={tiny_folder}", f"--train-file={file}", "--steps=2", "--lr=1e-3", "--max-length=96"]
    names = [derive.main([*common, f"--out={tmp_path / out}"]) for out in ("one", "two")]
    assert names[0] == names[1] == (tmp_path / "one" / "digest.txt").read_text()
    assert names[0] != derive.digest(load_model(tiny_folder, "float32"))
    assert derive.digest(load_model(str(tmp_path / "one"), "float32")) == names[0]


def test_processes_beside_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They see one GPU each; when the time is up they end; one that fails ends all with its name."""
    monkeypatch.setattr(policy_pipeline.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "note.py").write_text("import os, sys, pathlib\npathlib.Path(sys.argv[1]).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n")
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "fail.py").write_text("raise SystemExit(3)\n")
    pipeline = policy_pipeline.Pipeline(SimpleNamespace(state=tmp_path, work=tmp_path, pretrained="m", data="d", minutes=1.0))
    pipeline._beside({str(n): ["note", str(tmp_path / f"{n}.txt")] for n in range(3)})
    assert [(tmp_path / f"{n}.txt").read_text() for n in range(3)] == ["0", "1", "0"]
    with pytest.raises(SystemExit, match="b failed with status 3"):
        pipeline._beside({"a": ["note", str(tmp_path / "a.txt")], "b": ["fail"]})
    start, pipeline.options.minutes = time.monotonic(), 0.0
    pipeline._beside({"c": ["sleep"]})
    assert time.monotonic() - start < 10


def test_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is done once; the choice stops it until it is frozen; without time for the published recipe it ends early."""
    called: list[str] = []
    state = tmp_path / "state"
    (tmp_path / "data").mkdir()
    for task in ("copa", "squad"):
        (tmp_path / "data" / task).mkdir()
        (tmp_path / "data" / task / "train.jsonl").write_text("")

    def beside(pipeline: Any, work: dict[str, list[str]]) -> None:
        """What processes would write."""
        blocks = {"rows": 2, "batch_size": 1, "loss": 0.7, "blocks": {"b": [1, 1, 1]}}
        for name, (_, *options) in work.items():
            called.append(name)
            assert f"--tasks={name}" in options
            ledger.append(state / "statistics.jsonl", *({"task": name, "step": step, **blocks} for step in range(3)))

    def process(gpu: int, module: str, options: list[str], more: dict[str, str]) -> Any:
        """The published recipe, which ends at once."""
        assert (gpu, module, more) == (0, "zolightning", {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"})
        called.append("published")
        (tmp_path / "work" / "meta_published").mkdir(parents=True)
        (tmp_path / "work" / "meta_published" / "policy.safetensors").write_text("p")
        return SimpleNamespace(poll=lambda: 0, kill=lambda: None, wait=lambda: None)

    def policies(options: list[str]) -> None:
        called.append("policies")
        folder = tmp_path / "work" / "policies"
        folder.mkdir(parents=True)
        for name in ("curvature.json", *(f"{c}.safetensors" for c in ("upper_ratio", "by_loss_2", "shared_3", "shared_4"))):
            (folder / name).write_text(name)

    def run_all(config: dict[str, Any], workers: int, minutes: float) -> int:
        called.append(Path(config["ledger"]).stem)
        worth = {"shared_3": 0.4, "ours": 0.4}
        while runs := Plan(config).next_runs():
            losses = [worth.get(run.method, 0.6) + (0.0 if run.lr in (1e-6, 1e-5, 2e-5) else 0.1) for run in runs]
            ledger.append(Path(config["ledger"]), *(row for run, loss in zip(runs, losses, strict=True) for row in rows(run, loss)))
        return 0

    def derived(options: list[str]) -> None:
        called.append("derive")
        (tmp_path / "work" / "derived").mkdir()
        (tmp_path / "work" / "derived" / "digest.txt").write_text("0123abcd")

    monkeypatch.setattr(policy_pipeline.Pipeline, "_beside", beside)
    monkeypatch.setattr(policy_pipeline.Pipeline, "_process", staticmethod(process))
    monkeypatch.setattr(policy_pipeline.make_policies, "main", policies)
    monkeypatch.setattr(policy_pipeline.grid, "run_all", run_all)
    monkeypatch.setattr(policy_pipeline.derive, "main", derived)
    monkeypatch.setattr(policy_pipeline.os, "environ", dict(policy_pipeline.os.environ))
    options = ["--pretrained=m", f"--data={tmp_path / 'data'}", f"--state={state}", f"--work={tmp_path / 'work'}"]
    tasks = policy_pipeline.DESIGN_TASKS.split(",")
    policy_pipeline.main([*options, "--minutes=2"])
    assert called == [*tasks, "policies", "policy_design"]
    assert json.loads((state / "chosen.json").read_text())["policy"] == "shared_3"
    assert "commit them" in capsys.readouterr().out
    called.clear()
    policy_pipeline.main([*options, "--minutes=2", "--frozen"])
    assert called == []
    assert "published.safetensors is missing" in capsys.readouterr().out
    policy_pipeline.main(options)
    assert called == ["published"]
    assert (state / "published.safetensors").read_text() == (tmp_path / "work" / "policies" / "published.safetensors").read_text() == "p"
    assert "commit them" in capsys.readouterr().out
    called.clear()
    policy_pipeline.main([*options, "--frozen"])
    assert called == ["policy_rest", "derive", "policy_reuse", "policy_seen"]
    assert "all is done" in capsys.readouterr().out
    assert sorted(path.name for path in state.iterdir()) == [
        "chosen.json", "ours.safetensors", "policy_design.jsonl", "policy_rest.jsonl", "policy_reuse.jsonl", "policy_seen.jsonl",
        "published.safetensors", "statistics.jsonl",
    ]  # fmt: skip

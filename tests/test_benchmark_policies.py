"""From statistics to the policies that a comparison needs, and the methods that use them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from nets import tiny
from torch import Tensor

from benchmarks import ledger, make_policies, methods, predict, shapes, step_time
from zolightning.objectives import CandidateCrossEntropy
from zolightning.policies import Policy
from zolightning.spaces import DenseSpace


def row(task: str, names: list[str], factor: float) -> ledger.Row:
    """Statistics in which later blocks have more signal for their curvature."""
    blocks = {name: [factor * (i + 1), 2 * factor * (i + 1), factor * 10.0] for i, name in enumerate(names)}
    return {"task": task, "step": 0, "loss": 0.7, "rows": 8, "batch_size": 4, "blocks": blocks}


@pytest.fixture
def made(tiny_folder: str, tmp_path: Path) -> Path:
    """Policies of the tiny model, from two tasks of very different size."""
    from zolightning.models import load_model

    names = [block.name for block in DenseSpace(load_model(tiny_folder, "bfloat16")).blocks]
    for task, factor in (("a", 1.0), ("b", 1000.0), ("unused", -1.0)):
        ledger.append(tmp_path / "statistics.jsonl", row(task, names, factor))
    command = ["--statistics", str(tmp_path / "statistics.jsonl"), "--pretrained", tiny_folder, "--tasks", "a,b"]
    make_policies.main([*command, "--leave-out", "--out", str(tmp_path / "policies")])
    return tmp_path / "policies"


def test_policies(made: Path) -> None:
    """Each says how it was made; powers concentrate; the shares of curvature are one in all."""
    shares = json.loads((made / "curvature.json").read_text())
    assert sum(shares.values()) == pytest.approx(1)
    closed, three, four = (Policy.from_pretrained(made / f"{name}.safetensors") for name in ("closed_form", "shared_3", "shared_4"))
    assert closed.trained["tasks"] == ["a", "b"]
    ratio = closed.values.square() / closed.values.square().max()  # type: ignore[operator]
    assert torch.allclose(ratio, torch.arange(1, len(shares) + 1) / len(shares))
    assert torch.allclose(three.values.pow(4), four.values.pow(3), rtol=1e-5)  # type: ignore[operator]
    assert {path.stem for path in made.glob("*.safetensors")} == {
        "uniform", "untrained", "upper_half", "closed_form", "upper_ratio", "by_loss_1", "by_loss_2", "by_loss_3", "shared_3", "shared_4",
    }  # fmt: skip


def test_by_loss(made: Path, tiny_folder: str, tmp_path: Path) -> None:
    """Below: the ratio in the upper half. Above: equal scales, or what places of so high a loss share. Either with the same curvature."""
    plain = Policy.from_pretrained(made / "by_loss_2.safetensors")
    ratio = Policy.from_pretrained(made / "upper_ratio.safetensors")
    low, high = plain.values.detach().unbind(1)  # type: ignore[operator]
    shown = ratio.values.detach()  # type: ignore[operator]
    assert torch.allclose(low / low.max(), shown / shown.max())
    assert torch.allclose(high, torch.ones_like(high))
    names = [block.name for block in plain.blocks]
    more = row("c", names, 5.0) | {"loss": 2.0, "blocks": {name: [float(len(names) - i), 1.0, 10.0] for i, name in enumerate(names)}}
    ledger.append(made.parent / "statistics.jsonl", more)
    command = ["--statistics", str(made.parent / "statistics.jsonl"), "--pretrained", tiny_folder, "--tasks", "a,b,c"]
    make_policies.main([*command, "--out", str(tmp_path / "more")])
    high = Policy.from_pretrained(tmp_path / "more" / "by_loss_2.safetensors").values.detach()[:, 1]  # type: ignore[operator, index]
    assert high[0] > high[-1]
    assert float(high.square().mean()) == pytest.approx(1.0, rel=1e-5)


def test_policies_without_a_task(made: Path, tiny_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Say so; and what statistics predict is of a task that a policy has not seen, in units of equal scales."""
    assert Policy.from_pretrained(made / "without_a" / "closed_form.safetensors").trained["tasks"] == ["b"]
    capsys.readouterr()
    predict.main([f"--statistics={made.parent / 'statistics.jsonl'}", f"--pretrained={tiny_folder}", f"--policies={made}"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    values = {cells[0]: [float(cell) for cell in cells[1:]] for cells in lines[2:]}
    count = len(json.loads((made / "curvature.json").read_text()))
    assert lines[0][1:] == ["a", "b", "mean"]
    assert values["uniform"] == [0, 0, 0]
    # scales squared 1, 2, .. n, signal 1, 2, .. n and equal curvature 10 from 8 rows: (2n + 1) / 3 for (n + 1) / 2, over 10
    expected = math.log(((2 * count + 1) / 30 + 1 / 8) / ((count + 1) / 20 + 1 / 8))
    assert values["closed_form"] == pytest.approx([expected] * 3, abs=0.006)
    assert values["closed_form"][0] < values["shared_3"][0] < values["shared_4"][0]


def test_rates_mean_the_same(made: Path, tiny_folder: str) -> None:
    """The sum of rate times scale squared times curvature is the rate asked for, whatever the policy."""
    from zolightning.models import load_model

    shares = json.loads((made / "curvature.json").read_text())
    for name in ("uniform", "closed_form", "shared_3"):
        model = load_model(tiny_folder, "float32")
        optimizer = methods.policy(model, 1e-3, 0, str(made / f"{name}.safetensors"), str(made / "curvature.json"))
        names = [block.name for block in optimizer.space.blocks]
        cost = sum(float(s) ** 2 * shares[n] for s, n in zip(optimizer.sampler.scales(), names, strict=True))
        assert optimizer.param_groups[0]["lr"] * cost == pytest.approx(1e-3, rel=1e-5)


def test_first_order() -> None:
    """Adam goes down."""
    model = tiny("llama")
    batch = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
    bound = CandidateCrossEntropy().on(model, {**batch, "candidates": torch.tensor([[5, 6], [5, 6]]), "label": torch.tensor([0, 1])})
    stepper = methods.adam(model, 1e-2, 0)
    losses: list[Tensor] = [stepper.step(bound) for _ in range(10)]
    assert float(losses[-1]) < float(losses[0]) - 0.1
    assert stepper.forwards == 20


def test_step_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs on a CPU too; the rows have the columns that are promised."""
    monkeypatch.setattr("sys.argv", ["step_time", "--shapes", "tiny", "--tokens", "8", "--dtypes", "float32", "--out", str(tmp_path)])
    step_time.main()
    result = json.loads((tmp_path / "step_time.json").read_text())
    columns = {"shape", "tokens", "dtype", "sampler", "limit_ms", "textbook_ms", "ours_ms", "peak_over_weights"}
    assert [row["sampler"] for row in result["rows"]] == ["gaussian", "rademacher"]
    assert all(columns <= row.keys() and row["ours_ms"] > 0 for row in result["rows"])
    assert (tmp_path / "step_time.png").stat().st_size > 1000
    assert "tiny" in capsys.readouterr().out
    assert set(shapes.SHAPES) >= {"smollm2-135m", "llama-3.2-1b", "llama-3.1-8b", "opt-13b"}

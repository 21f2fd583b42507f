"""The ``zolightning`` command as a user meets it."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import zolightning

Main = Callable[..., Any]
Run = Callable[..., subprocess.CompletedProcess[str]]


def blocks(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's checkpoint; nothing but plain data is unpickled."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return {name: tensor.view(torch.int16) for name, tensor in checkpoint["state_dict"].items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all bits agree."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_fit_then_validate(main: Main, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics, configuration and checkpoint lie in the run folder; validate reproduces the figures of the last evaluation."""
    main("fit", *options, "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=6")
    folder = tmp_path / "run"
    assert (folder / "config.yaml").exists()
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["train/forwards"] for row in rows if row["train/loss"]] == ["4.0", "8.0", "12.0"]
    evaluated = [row for row in rows if row["val/loss"]]
    assert (evaluated[0]["train/forwards"], evaluated[-1]["train/forwards"]) == ("0.0", "12.0")
    last = evaluated[-1]
    assert {"val/loss_corrected", "val/constant_loss", "val/accuracy_corrected"} <= last.keys()
    capsys.readouterr()
    main("validate", *options, f"--ckpt_path={folder}/checkpoints/last.ckpt", f"--trainer.default_root_dir={tmp_path / 'val'}")
    assert f"{float(last['val/loss']):.4f}" in capsys.readouterr().out


def test_console_script(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's exit status is what its function returns: a run that went well must return nothing."""
    scripts = entry_points(group="console_scripts", name="zolightning")
    if not scripts:
        pytest.skip("the package is not installed")
    monkeypatch.setattr("sys.path", sys.path.copy())
    monkeypatch.setattr("sys.argv", ["zolightning", "fit", *options, "--trainer.max_steps=2"])
    assert next(iter(scripts)).load()() is None


def test_status_after_sigterm(options: list[str], tmp_path: Path) -> None:
    """As any process that a signal has ended: a scheduler must not take it for done."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "zolightning", "fit", *options, "--trainer.max_steps=100000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if (tmp_path / "run" / "journal.zo").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM


def test_help_is_quick(run: Run) -> None:
    """What Lightning imports (torch, its compiler, torchmetrics) takes four seconds; nothing may come on top."""
    start = time.perf_counter()
    done = run("fit", "--help")
    took = time.perf_counter() - start
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: zolightning")
    assert done.stdout.rstrip().endswith("default: null)")
    assert took < 15, "about 4 s on an idle machine with two cores"


def test_help_imports_little() -> None:
    """No Lightning before garbage collection is off, and no library that only a run needs."""
    code = (
        "import sys\n"
        "from zolightning.cli import main\n"
        "assert not {'lightning', 'torch'} & set(sys.modules)\n"
        "try: main(['fit', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'datasets', 'pandas', 'pyarrow', 'scipy', 'peft', 'bitsandbytes', 'transformers.modeling_utils'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 0, done.stderr


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from zolightning.cli import main

    monkeypatch.setattr("sys.path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"zolightning {zolightning.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [(["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"], 2), (["--trainer.max_time=00:00:00:00"], None), ([], 0)],
)
def test_training_has_an_end(
    arguments: list[str], steps: int | None, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without trainer.max_steps, max_epochs and max_time the run is refused: Lightning would go on for ever, or for 1,000 epochs."""
    from zolightning.cli import main

    monkeypatch.setattr("sys.argv", ["zolightning"])
    monkeypatch.setattr("sys.path", sys.path.copy())
    command = ["fit", *(option for option in options if "max_steps" not in option), *arguments]
    if steps == 0:
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        assert capsys.readouterr().err == "error: when does training end? set trainer.max_steps (or max_epochs, or max_time)\n"
    else:
        assert main(command).trainer.global_step in ((steps,) if steps else (0, 1, 2, 3))


def test_resume_in_the_middle_of_an_epoch(main: Main, options: list[str], tmp_path: Path) -> None:
    """Ten batches an epoch: 4 + 9 steps equal 13 steps, bit for bit, learning rate schedule included."""
    schedule = ["--model.lr_scheduler=torch.optim.lr_scheduler.LinearLR", "--model.lr_scheduler.total_iters=13"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps, more in (
        (whole, 13, []),
        (parts, 4, []),
        (parts, 13, [f"--ckpt_path={parts}/checkpoints/last.ckpt"]),
    ):
        main("fit", *options, *schedule, *more, f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}")
        if steps == 4:
            early = blocks(parts)
    assert same(blocks(whole), blocks(parts))
    assert not same(early, blocks(parts))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.optimizer.eps=1e-7"], "eps=1e-07 is below what bfloat16 weights of this size resolve"),
        (["--model.optimizer.lr=0"], "lr=0.0 must be positive"),
        (["--model.optimizer.lr=-1e-6"], "lr=-1e-06 must be positive"),
        (["--trainer.precision=bf16-mixed"], "trainer.precision='bf16-mixed': keep 32-true and set model.dtype"),
        (["--trainer.precision=16-true"], "trainer.precision='16-true': keep 32-true and set model.dtype"),
        (["--model.space.include=[nothing*]"], "pattern 'nothing*' matches no parameter"),
        (["--model.space.exclude=['*']"], "nothing to move"),
        (["--model.pretrained=/nowhere"], "model folder '/nowhere' does not exist"),
        (["--model.micro_batch_size=0"], "micro_batch_size=0 must be at least 1"),
        (["--model.epss=1"], "Option 'epss' is not accepted"),
        (["--data.task=nope"], "unknown task 'nope'"),
        (["--data.train_file=nope.jsonl"], "nope.jsonl"),
        (["--ckpt_path=nope.ckpt"], "nope.ckpt"),
        (["--config=nope.yaml"], "File does not exist"),
    ],
)
def test_bad_input(
    options: list[str], arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clear line and a non-zero status."""
    from zolightning.cli import main

    monkeypatch.setattr("sys.argv", ["zolightning"])
    monkeypatch.setattr("sys.path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options, *arguments])
    assert stop.value.code == 2
    assert any(message in line and len(line) < 300 for line in capsys.readouterr().err.splitlines())


def test_checkpoint_of_another_model(main: Main, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused by the first block that differs; the checkpoint stays as it is."""
    main("fit", *options)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main("fit", *options, "--model.dtype=float32", f"--ckpt_path={checkpoint}")
    assert stop.value.code == 2
    assert "block 'model.embed_tokens.weight' is bfloat16" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_fp16_overflow(main: Main, options: list[str], tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that overflows is refused at the set-up probe."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(60000.0)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "huge")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "huge")
    with pytest.raises(SystemExit) as stop:
        main("fit", *options, f"--model.pretrained={tmp_path / 'huge'}", "--model.dtype=float16")
    assert stop.value.code == 2
    assert "the loss at the set-up probe is" in capsys.readouterr().err

"""Runs that are killed with SIGKILL at random moments and taken up again: do they end in the bits of a run without a break?

    python -m benchmarks.kills --kills 100 --out docs/results/kills.json

Everything is imported once, by a process that does nothing else; each run is forked from it, with ``--ckpt_path last``. Every fourth
kill waits for the moment at which a checkpoint is being written. A run is killed several times before it is left to finish.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ledger


def start(options: Sequence[str], folder: Path) -> int:
    """Fork a process that runs ``zolightning fit``; its output goes to ``folder/output.txt``.

    Returns:
        Its process id.
    """
    from zolightning.cli import main

    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # torch's threads do not always survive a fork
        sys.argv = ["zolightning"]
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        main(["fit", *options, f"--trainer.default_root_dir={folder}", "--ckpt_path=last"])
        status = 0
        (folder / "modules.json").write_text(json.dumps(list(sys.modules)))
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(child: int) -> int:
    """Wait for a process; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child: int, folder: Path, moment: float, writing: bool, number: int = signal.SIGKILL) -> bool:
    """Send a signal to a process after some seconds.

    Args:
        child: Its id.
        folder: Its run folder.
        moment: Seconds to wait.
        writing: Then wait on for a checkpoint that is half written.
        number: The signal.

    Returns:
        Whether it was still running.
    """
    begin, end = time.time(), time.monotonic() + moment
    while time.monotonic() < end or (writing and not half_written(folder, begin)):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.0005)
    running = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    os.kill(child, number)
    finish(child)
    return running


def half_written(folder: Path, since: float) -> bool:
    """Whether a checkpoint is being written that was begun after some time."""
    try:
        return (folder / "checkpoints" / "last.ckpt.partial").stat().st_mtime > since
    except FileNotFoundError:
        return False


def weights(folder: Path) -> dict[str, bytes]:
    """The bits of a run's last checkpoint."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


def standing(folder: Path) -> int:
    """Steps in a run's journal."""
    from zolightning.journal import read

    path = folder / "journal.zo"
    journal = read(path) if path.exists() else None
    return journal.steps if journal is not None and journal.all_settings else 0


def killed_run(options: Sequence[str], folder: Path, kills: int, dice: random.Random, seconds: float) -> dict[str, Any]:
    """One run that is killed some times, each time taken up again, then left to finish.

    Args:
        options: Of ``fit``.
        folder: Its run folder.
        kills: How often.
        dice: Choose the moments.
        seconds: What the whole run takes.

    Returns:
        Steps in the journal at each kill, how many kills fell into a checkpoint, and whether anything was lost that had been written.
    """
    seen: list[int] = []
    writing, lost = 0, 0
    while len(seen) < kills:
        aimed = dice.random() < 0.25
        begin, before = time.time(), standing(folder)
        child = start(options, folder)
        if not kill(child, folder, dice.uniform(0, seconds), aimed):
            break  # it was faster than the kill
        after = standing(folder)
        lost += after < before
        writing += half_written(folder, begin)
        seen.append(after)
    status = finish(start(options, folder))
    if status:
        print(f"a run ended with status {status}:", (folder / "output.txt").read_text()[-3000:], file=sys.stderr, flush=True)
    return {"steps_at_kills": seen, "in_checkpoint": writing, "lost": lost, "status": status}


def measure(options: Sequence[str], folder: Path, kills: int, kills_a_run: int, seed: int) -> dict[str, Any]:
    """Kill runs until there were enough kills, and compare each with a run without a break.

    Args:
        options: Of ``fit``.
        folder: For all run folders.
        kills: How many in all.
        kills_a_run: How many a run gets at most.
        seed: Of the moments.

    Returns:
        Counts.
    """
    dice, begin = random.Random(seed), time.monotonic()
    if finish(start(options, folder / "whole")):
        raise RuntimeError((folder / "whole" / "output.txt").read_text())
    expected = weights(folder / "whole")
    for name in json.loads((folder / "whole" / "modules.json").read_text()):
        with contextlib.suppress(Exception):  # a few can only be imported by others
            importlib.import_module(name)
    begin = time.monotonic()
    finish(start(options, folder / "again"))
    seconds = time.monotonic() - begin
    result = {"kills": 0, "runs": 0, "equal": 0, "failed": 0, "kills_in_checkpoint": 0, "lost": 0}
    steps = []
    while result["kills"] < kills:
        run = folder / f"run{result['runs']}"
        found = killed_run(options, run, min(kills_a_run, kills - result["kills"]), dice, seconds)
        result["kills"] += len(found["steps_at_kills"])
        result["runs"] += 1
        result["failed"] += found["status"] != 0
        result["equal"] += found["status"] == 0 and weights(run) == expected
        result["kills_in_checkpoint"] += found["in_checkpoint"]
        result["lost"] += found["lost"]
        steps += found["steps_at_kills"]
    return result | {"steps_at_kills": steps, "seconds_of_a_run": round(seconds, 2), "seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-a-run", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, help="a list of options of fit, as JSON; without it: the quickstart, shortened")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = arguments.options or [
        "--config=configs/quickstart.yaml", f"--trainer.max_steps={arguments.steps}", "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=3", "--checkpoint.every_n_train_steps=7",
        "--trainer.accelerator=cpu", "--data.num_train=160",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder), arguments.kills, arguments.kills_a_run, arguments.seed)
    result |= {
        "options": options,
        "seed": arguments.seed,
        **ledger.made_by(),
    }
    if arguments.out:
        ledger.write(arguments.out, result)
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["equal"] == result["runs"] else 1)


if __name__ == "__main__":
    main()

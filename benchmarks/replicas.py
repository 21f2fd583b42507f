"""Replicas: what n devices do in the time of one, what crosses the wire, whether they agree, and what becomes of a killed one.

    python -m benchmarks.replicas --shape smollm2-135m --devices 2 4
    python -m benchmarks.replicas --devices 3 --steps 0 --kill

Each device has the same work, however many there are: in mode ``rows`` its own 16 rows, in mode ``directions`` its own query.
``efficiency`` is (rows x forwards a second on n devices) / (n x those on one), from the median time of ten steps. ``wire`` is what each
device sends in a step. After the last step the weights of all are compared bit by bit. With ``--kill`` the command trains
``--pretrained`` on the most devices, the last process is killed in the middle, and the run goes on with one less; its weights are
compared with those of one device. Processes are started here; on a machine with GPUs each takes one (NCCL), else a core (gloo).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks import ledger, shapes
from zolightning import DenseSpace, RademacherSampler, TwoPoint, ZOOptimizer
from zolightning.objectives import CandidateCrossEntropy
from zolightning.optim import Replicas
from zolightning.optim.checksum import checksum
from zolightning.optim.replicas import Mode

ROWS = 16  # a device, in mode rows; in all, in mode directions
TIMED = 10  # steps between two looks at the clock: nothing else makes a host wait for its device
KEY = ("shape", "dtype", "tokens", "mode", "devices", "machine")
MODES: tuple[Mode, ...] = ("rows", "directions")


def work(rank: int, world: int, mode: Mode, arguments: argparse.Namespace, folder: str) -> None:
    """One process of a run."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", f"file://{folder}/store", timedelta(seconds=300), world, rank)
    model = shapes.make(arguments.shape, getattr(torch, arguments.dtype), device)
    batch = shapes.batch(model, ROWS * world if mode == "rows" else ROWS, arguments.tokens, device)
    bound = CandidateCrossEntropy().on(model, batch)
    estimator = TwoPoint(1 if mode == "rows" else world)
    optimizer = ZOOptimizer(DenseSpace(model), RademacherSampler(), estimator, lr=1e-6)
    if world > 1:
        optimizer.replicas = Replicas(mode)
    times = []
    for _ in range(arguments.steps // TIMED):
        start = time.perf_counter()
        for _ in range(TIMED):
            optimizer.step(bound)
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / TIMED)
    found = {
        "seconds": statistics.median(times[1:]),
        "payload": optimizer.replicas.payload if optimizer.replicas is not None else 0,
        "checksum": f"{int(checksum(block.tensor for block in optimizer.space.blocks)) % (1 << 64):016x}",
        "form": optimizer.param_groups[0]["form"],
    }
    Path(folder, str(rank)).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    optimizer.release()
    dist.destroy_process_group()


def measure(world: int, mode: Mode, arguments: argparse.Namespace) -> ledger.Row:
    """A run on some devices."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(work, (world, mode, arguments, folder), world, start_method="spawn")
        found = [json.loads(Path(folder, str(rank)).read_text(encoding="utf-8")) for rank in range(world)]
    seconds = max(each["seconds"] for each in found)
    row: ledger.Row = {"shape": arguments.shape, "dtype": arguments.dtype, "tokens": arguments.tokens, "mode": mode, "devices": world}
    row |= {"ms": round(seconds * 1e3, 3), "row_forwards_per_second": round(2 * ROWS * world / seconds, 2)}
    row |= {"wire": found[0]["payload"] * (world - 1), "steps": arguments.steps, "form": found[0]["form"]}
    row |= {"checksum": found[0]["checksum"], "equal": len({each["checksum"] for each in found}) == 1}
    return row


def killed(devices: int, then: int, arguments: argparse.Namespace) -> ledger.Row:
    """The command on some devices, one of them killed, the rest on another number; beside one device that nobody kills."""
    accelerator, begin = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic()
    command = [sys.executable, "-m", "zolightning", "fit", "--model=zolightning.ZOFinetuneModule", "--model.dtype=float32"]
    command += [f"--model.pretrained={arguments.pretrained}", "--model.estimator=zolightning.TwoPoint", "--model.estimator.queries=4"]
    command += ["--data=zolightning.TaskDataModule", "--data.task=demo", f"--checkpoint.every_n_train_steps={arguments.kill_steps // 8}"]
    command += [f"--trainer.accelerator={accelerator}", "--trainer.limit_val_batches=0", f"--trainer.max_steps={arguments.kill_steps}"]
    command += ["--trainer.strategy=zolightning.ReplicaStrategy", "--trainer.strategy.mode=directions", "--ckpt_path=last"]
    with tempfile.TemporaryDirectory() as folder:

        def start(name: str, count: int) -> subprocess.Popen[str]:
            more = [f"--trainer.default_root_dir={folder}/{name}", f"--trainer.devices={count}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen([*command, *more], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

        def finish(run: subprocess.Popen[str]) -> None:
            error = run.communicate()[1]
            if run.returncode:
                raise RuntimeError(error)

        def load(name: str) -> dict[str, Any]:
            checkpoint: dict[str, Any] = torch.load(Path(folder, name, "checkpoints", "last.ckpt"), weights_only=True, map_location="cpu")
            return checkpoint

        def say(what: str) -> None:
            print(f"{time.monotonic() - begin:6.1f} s  {what}", file=sys.stderr, flush=True)

        alone, run = start("one", 1), start("many", devices)
        while not Path(folder, "many", "checkpoints", "last.ckpt").exists():
            if run.poll() is not None:
                raise RuntimeError(f"the run ended before it was killed: {run.communicate()[1]}")
            time.sleep(0.05)
        os.kill(replica(run.pid, devices - 1), signal.SIGKILL)
        say("killed the last replica")
        start_of_end = time.monotonic()
        message = run.communicate()[1].strip().splitlines()[-1]
        took = time.monotonic() - start_of_end
        say(message)
        step = load("many")["global_step"]
        finish(start("many", then))
        say(f"{then} devices went on from step {step} to the end")
        finish(alone)
        say("one device has done the whole")
        one, many = load("one")["state_dict"], load("many")["state_dict"]
        equal = all(torch.equal(tensor, many[name]) for name, tensor in one.items())
    row: ledger.Row = {"pretrained": arguments.pretrained, "devices": devices, "then": then, "resumed_from_step": step}
    row |= {"steps": arguments.kill_steps, "message": message, "seconds_to_stop": round(took, 2), "equal_to_one_device": equal}
    return row


def replica(parent: int, rank: int) -> int:
    """The process of that rank among those that a run has started; compilers are others."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"LOCAL_RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise RuntimeError(f"process {parent} has no replica {rank}")


def table(rows: list[ledger.Row]) -> list[str]:
    """Lines to print."""
    head = f"{'shape':14s} {'mode':10s} {'devices':>7s} {'ms/step':>9s} {'rows/s':>10s} "
    lines = [head + f"{'efficiency':>10s} {'wire B/step':>11s} {'bit-equal':>9s}"]
    for row in rows:
        lines.append(
            f"{row['shape']:14s} {row['mode']:10s} {row['devices']:7d} {row['ms']:9.2f} {row['row_forwards_per_second']:10.1f} "
            f"{row['efficiency']:10.3f} {row['wire']:11d} {row['equal']!s:>9s}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=list(shapes.SHAPES))
    parser.add_argument("--devices", nargs="+", type=int, default=[2])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200, help="of each run that is timed; 0: none is")
    parser.add_argument("--kill", action="store_true", help="kill a process of a run, and go on with one device less")
    parser.add_argument("--kill-steps", type=int, default=40, help="of the run that is killed")
    parser.add_argument("--pretrained", default="demo", help="trained by the command in the run that is killed")
    parser.add_argument("--out", type=Path, default=Path("docs/results/replicas.json"))
    arguments = parser.parse_args()
    about, rows = {**ledger.made_by(), "command": ledger.command("replicas"), "cores": os.cpu_count()}, list[ledger.Row]()
    if arguments.steps:
        found = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"] if arguments.out.exists() else []
        wanted = {**about, "shape": arguments.shape, "dtype": arguments.dtype, "tokens": arguments.tokens, "devices": 1}
        known = [row for row in found if all(row[name] == wanted[name] for name in (*KEY, "commit") if name != "mode")]
        base = known[0] if known else measure(1, "rows", arguments)  # one query of one device's rows: the same in both modes
        for row in itertools.chain([base], (measure(world, mode, arguments) for world in arguments.devices for mode in MODES)):
            row["efficiency"] = round(row["row_forwards_per_second"] / row["devices"] / base["row_forwards_per_second"], 4)
            rows.append(row)
            print(table(rows)[-1], flush=True)
            if not known or row is not base:
                ledger.replace(arguments.out, row | about, KEY)
        print(*table(rows), sep="\n", flush=True)
    if arguments.kill:
        row = killed(max(arguments.devices), max(arguments.devices) - 1, arguments)
        print(json.dumps(row, indent=1))
        ledger.replace(arguments.out.with_stem(arguments.out.stem + "_killed"), row | about, ("pretrained", "devices", "machine"))


if __name__ == "__main__":
    main()

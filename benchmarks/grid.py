"""Compare methods: method x task x model x seed x learning rate from one YAML, into one resumable ledger.

    python -m benchmarks.grid benchmarks/grids/sst2_precision.yaml --workers 6

Every method first searches its learning rate (``search``: one seed, a short run, held-out training rows decide), then runs with
the best one (``final``). If an end of the list wins for one of the methods that share it, one point beyond is added for all of them. A run
that is in the ledger is not run again, so the same command goes on where the last one stopped. With ``--minutes`` it ends by itself.

The order: methods marked ``first``, of all tasks; then task by task, tasks without headroom (benchmarks.headroom) last; within a task all
searches, then all methods of the first seed, then of the next. So what is there when time is up can be compared.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.plan import Plan
from benchmarks.runs import Run, execute, release
from benchmarks.times import clock, estimate


def load(path: Path, ledger: str | Path | None = None) -> dict[str, Any]:
    """Read a grid, with another ledger than its own where one is given; ``${NAME}`` in strings is taken from the environment."""
    config: dict[str, Any] = yaml.safe_load(os.path.expandvars(path.read_text(encoding="utf-8")))
    return config if ledger is None else config | {"ledger": str(ledger)}


def run_all(config: dict[str, Any], workers: int, minutes: float = math.inf) -> int:
    """Run what is left, as far as the time goes, with so many workers on each GPU; returns how many runs failed."""
    start, failed = time.monotonic(), set[tuple[Any, ...]]()
    running: dict[tuple[Any, ...], tuple[int, Any]] = {}  # run: its GPU, what it returns
    gpus = max(torch.cuda.device_count(), 1)
    plan, most = Plan(config), workers * gpus
    count, seconds = plan.outlook()
    print(f"{count} runs are left, about {clock(seconds / most)} with {most} workers; {len(plan.done)} are done", flush=True)
    # A fresh process now and then, so that what compilers and graphs leave behind does not pile up.
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = [stack.enter_context(context.Pool(workers, see, (gpu,), maxtasksperchild=16)) for gpu in range(gpus)]
        while True:
            left = minutes * 60 - (time.monotonic() - start)
            if len(running) < most:
                plan = Plan(config)
                finals = list(plan.done.values())
                free = [run for run in plan.next_runs() if run.key not in running and run.key not in failed]
                fitting = [run for run in free if estimate(run, finals, config) < left]
                for run in fitting[: most - len(running)]:
                    busy = Counter(gpu for gpu, _ in running.values())
                    gpu = min(range(gpus), key=busy.__getitem__)
                    running[run.key] = gpu, pools[gpu].apply_async(attempt, (run,))
            if not running or left < 0:
                break
            for key in [key for key, (_, result) in running.items() if result.ready()]:
                try:
                    print(f"{time.monotonic() - start:6.0f} s  {running.pop(key)[1].get()}", flush=True)
                except Exception as error:  # one bad cell must not end the grid
                    failed.add(key)
                    print("failed:", *key, error, file=sys.stderr, flush=True)
            time.sleep(0.2)
        if running:
            print(f"time is up: {len(running)} runs were cut off and will start again", flush=True)
    count, seconds = Plan(config).outlook()
    print(f"{count} runs are left, about {clock(seconds / most)}", flush=True)
    return len(failed)


def attempt(run: Run) -> str:
    """A run in a worker. What goes wrong is said there and comes back as text: not every error can travel between processes."""
    try:
        return execute(run)
    except Exception as error:
        traceback.print_exc()
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    finally:
        release()


def see(gpu: int) -> None:
    """Let this process have one GPU of several."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu_name(gpu)


def gpu_name(number: int) -> str:
    """What CUDA calls one of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(number) if visible is None else [*visible.split(","), ""][number]


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes that share a GPU")
    parser.add_argument("--ledger", help="another results file than the YAML's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run that would end later; cut off what runs then")
    parser.add_argument("--dry-run", action="store_true", help="list the runs that could start now, in their order")
    arguments = parser.parse_args(options)
    config = load(arguments.config, arguments.ledger)
    if arguments.dry_run:
        for run in Plan(config).next_runs():
            print(*run.key)
        return
    if failed := run_all(config, arguments.workers, arguments.minutes):
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main()

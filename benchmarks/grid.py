"""Compare methods: method x task x model x seed x learning rate from one YAML, into one resumable ledger.

    python -m benchmarks.grid benchmarks/grids/sst2_precision.yaml --workers 6

Every method first searches its learning rate (``search``: one seed, a short run, held-out training rows decide), then runs with
the best one (``final``). If an end of the list wins, one point beyond it is added. A run that is in the ledger is not run again,
so the same command goes on where the last one stopped. Rows of unfinished runs stay in the ledger, marked ``"final": false``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import ledger, methods

_FIELDS = ("stage", "method", "model", "task", "seed", "lr", "forwards_asked")


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    stage: str
    method: str
    model: str
    task: str
    seed: int
    lr: float
    forwards_asked: int
    settings: dict[str, Any] = field(compare=False, hash=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the run in the ledger."""
        return tuple(getattr(self, name) for name in _FIELDS)


def load(path: Path) -> dict[str, Any]:
    """Read a grid; ``${NAME}`` in strings is taken from the environment."""
    import os

    config: dict[str, Any] = yaml.safe_load(os.path.expandvars(path.read_text(encoding="utf-8")))
    return config


def make_run(config: dict[str, Any], stage: str, method: str, model: str, task: str, seed: int, lr: float) -> Run:
    settings = {"method": config["methods"][method], "model": config["models"][model], "task": config["tasks"][task]}
    settings |= {"evaluations": config[stage].get("evaluations", 1), "ledger": config["ledger"]}
    return Run(stage, method, model, task, seed, float(lr), config[stage]["forwards"], settings)


def cells(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """All (method, model, task)."""
    return [(method, model, task) for method in config["methods"] for model in config["models"] for task in config["tasks"]]


def finished(config: dict[str, Any]) -> dict[tuple[Any, ...], ledger.Row]:
    """Final rows by run key."""
    rows = ledger.read(Path(config["ledger"]))
    return {tuple(row[name] for name in _FIELDS): row for row in rows if row["final"]}


def next_runs(config: dict[str, Any]) -> list[Run]:
    """The runs that can start now and are not in the ledger: searches, then one more point at a winning edge, then finals."""
    done = finished(config)
    wanted: list[Run] = []
    for method, model, task in cells(config):
        source = config["methods"][method].get("lr_of", method)  # a method may share the rate that another one found
        searches = pending_searches(config, done, source, model, task)
        best = best_lr(done, source, model, task)
        if searches or best is None:
            wanted += searches if source == method else []
            continue
        seeds = config["methods"][method].get("seeds", config["final"]["seeds"])
        wanted += [make_run(config, "final", method, model, task, seed, best) for seed in seeds]
    return [run for run in wanted if run.key not in done]


def pending_searches(config: dict[str, Any], done: dict[tuple[Any, ...], ledger.Row], method: str, model: str, task: str) -> list[Run]:
    """The searches that are still to run: the listed rates, then one point beyond an end that won."""
    search = config["search"]
    lrs = [float(lr) for lr in config["methods"][method].get("lrs", search["lrs"])]
    runs = [make_run(config, "search", method, model, task, search["seed"], lr) for lr in lrs]
    missing = [run for run in runs if run.key not in done]
    best = best_lr(done, method, model, task)
    if missing or best not in (min(lrs), max(lrs)) or len(lrs) == 1:
        return missing
    edge = best / search["factor"] if best == min(lrs) else best * search["factor"]
    extra = make_run(config, "search", method, model, task, search["seed"], float(f"{edge:.3g}"))
    return [] if extra.key in done else [extra]


def best_lr(done: dict[tuple[Any, ...], ledger.Row], method: str, model: str, task: str) -> float | None:
    """The searched rate with the lowest bias-corrected loss (raw where there is none) on held-out training rows."""
    rows = [row for row in done.values() if (row["stage"], row["method"], row["model"], row["task"]) == ("search", method, model, task)]
    usable = [row for row in rows if row["loss"] == row["loss"]]
    if not usable:
        return None
    return float(min(usable, key=lambda row: float(row["loss_corrected"] if "loss_corrected" in row else row["loss"]))["lr"])


def execute(run: Run) -> str:
    """One run: train, evaluate on the way, write the ledger; returns one line for the screen."""
    from zolightning.models import load_model, load_tokenizer
    from zolightning.modules.base import OBJECTIVES
    from zolightning.tasks import TaskDataModule

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method, task = run.settings["method"], dict(run.settings["task"])
    new_tokens = task.pop("max_new_tokens", None)
    if run.stage == "search":
        task |= {"validation_file": None, "num_validation": 500}  # held-out training rows choose the learning rate
    data = TaskDataModule(**task, seed=run.seed, tokenizer=load_tokenizer(run.settings["model"]))
    data.setup("fit")
    model = load_model(run.settings["model"], method.get("dtype", "bfloat16"), device)
    stepper = methods.build(method["build"], model, run.lr, run.seed, method.get("arguments", {}))
    objective = OBJECTIVES[data.objective]()
    steps_at = [round(run.forwards_asked * i / run.settings["evaluations"]) for i in range(run.settings["evaluations"] + 1)]
    tokens, seconds, step, row = 0, 0.0, 0, {}
    for target in steps_at:
        start = time.perf_counter()
        while stepper.forwards < target:
            batch, before = data.train_batch(step), stepper.forwards
            bound = objective.on(model, {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
            stepper.step(bound)
            tokens += int(batch["attention_mask"].sum()) * (stepper.forwards - before)
            step += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        row = {name: getattr(run, name) for name in _FIELDS}
        row |= {"forwards": stepper.forwards, "tokens": tokens, "seconds": round(seconds, 2)}
        row |= {name: round(value, 6) for name, value in evaluate(model, data, device, new_tokens).items()}
        row |= {"final": target == run.forwards_asked, "machine": ledger.machine(), "commit": ledger.commit(), "torch": torch.__version__}
        ledger.append(Path(run.settings["ledger"]), row)
    return f"{run.stage} {run.method} {run.task} seed {run.seed} lr {run.lr:g}: loss {row['loss']:.4f}, {row['seconds']:.0f} s"


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: Any, device: torch.device, new_tokens: int | None = None) -> dict[str, float]:
    """Figures on all validation rows; answers are cut after ``new_tokens``, where given."""
    from zolightning.modules.evaluation import EVALUATIONS, Context

    context = Context(data.validation_examples, data.tokenizer, new_tokens or data.task.max_new_tokens, data.metric)
    evaluation = EVALUATIONS[data.objective](context)
    for loader, batches in enumerate(data.val_dataloader()):
        for batch in batches:
            evaluation.update(model, {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}, loader)
    return evaluation.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the GPU")
    parser.add_argument("--ledger", help="another results file than the YAML's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--dry-run", action="store_true", help="list the runs that could start now")
    arguments = parser.parse_args()
    config = load(arguments.config)
    config["ledger"] = arguments.ledger or config["ledger"]
    if arguments.dry_run:
        for run in next_runs(config):
            print(*run.key)
        return
    start, failed = time.monotonic(), set()
    running: dict[tuple[Any, ...], Any] = {}
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        while True:
            if time.monotonic() - start < arguments.seconds:
                for run in next_runs(config):
                    if len(running) < arguments.workers and run.key not in running and run.key not in failed:
                        running[run.key] = pool.apply_async(execute, (run,))
            if not running:
                break
            for key in [key for key, result in running.items() if result.ready()]:
                try:
                    print(f"{time.monotonic() - start:6.0f} s  {running.pop(key).get()}", flush=True)
                except Exception as error:  # one bad cell must not end the grid
                    failed.add(key)
                    print("failed:", *key, error, file=sys.stderr, flush=True)
            time.sleep(0.2)
    if failed:
        sys.exit(f"{len(failed)} runs failed")


if __name__ == "__main__":
    main()

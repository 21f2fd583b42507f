r"""Statistics of every block on several tasks: signal, noise and curvature, along a teacher's path.

    python -m benchmarks.collect_statistics --pretrained FOLDER --data DATA --tasks sst2,rte,boolq --rows 16 --batches 16 \
        --biases fitted --trajectory 60 --points 3 --output runs/statistics

Each task starts at the pretrained weights. At ``points`` places of a path of ``trajectory`` steps it measures ``batches`` batches of
``rows`` rows: ``G`` without bias, ``E||g_B||^2`` and ``F`` (see zolightning.modules.statistics). ``statistics.jsonl`` has one row per
task and place with these numbers by name of the block, for tasks with candidates also ``without_prior`` (see zolightning.modules.prior).
Tasks and places that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from benchmarks import ledger
from zolightning import CandidateCrossEntropy, DenseSpace, OneCopySGD, TaskDataModule
from zolightning.models import load_model, load_tokenizer
from zolightning.modules.base import OBJECTIVES
from zolightning.modules.evaluation import CALIBRATION, fitted_biases
from zolightning.modules.per_row import RowNorms
from zolightning.modules.prior import without_prior
from zolightning.modules.statistics import BlockStatistics, collect_statistics

_FIELDS = ("gradient", "batch", "fisher")


def main(options: Sequence[str] | None = None) -> None:
    arguments, start = parse(options), time.monotonic()
    path = arguments.output / "statistics.jsonl"
    places = [round(arguments.trajectory * i / max(arguments.points - 1, 1)) for i in range(arguments.points)]
    for task in arguments.tasks.split(","):
        missing = [place for place in places if (task, place) not in load(path)]
        if missing and (time.monotonic() - start) / 60 < arguments.minutes:
            for row in measure(task, places, missing, arguments):
                ledger.append(path, row)
                ratio = row["gradient_sum"] / row["fisher_sum"]
                print(f"{task} step {row['step']}: loss {row['loss']:.4f}, G {row['gradient_sum']:.3g}, G/F {ratio:.2g}, "
                      f"{row['seconds']:.0f} s", flush=True)  # fmt: skip
                if (time.monotonic() - start) / 60 >= arguments.minutes:
                    break


def parse(options: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder or hub id of the model; demo: the one that comes with the package")
    parser.add_argument("--data", type=Path, required=True, help="folder with TASK/train.jsonl or TASK/train.jsonl.gz")
    parser.add_argument("--tasks", required=True, help="short names, by commas")
    parser.add_argument("--rows", type=int, default=16, help="rows a batch")
    parser.add_argument("--batches", type=int, default=16, help="batches at each place, an epoch at most")
    parser.add_argument("--together", type=int, default=16, help="rows whose own gradients are taken in one backward")
    parser.add_argument("--biases", choices=("fitted", "none"), default="fitted", help="candidate biases refitted at each place")
    parser.add_argument("--trajectory", type=int, default=0, help="steps of the teacher")
    parser.add_argument("--points", type=int, default=1, help="places on its path, first and last step included")
    parser.add_argument("--teacher-lr", type=float, default=1e-3, help="of gradient descent, every block's gradient clipped to 1")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--max-length", type=int, default=256, help="tokens a row")
    parser.add_argument("--num-train", type=int, default=1000, help="training rows")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and order of the rows")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after this time")
    parser.add_argument("--output", type=Path, default=Path("runs/statistics"), help="folder for the results")
    return parser.parse_args(options)


def measure(task: str, places: list[int], missing: list[int], arguments: argparse.Namespace) -> Iterator[ledger.Row]:
    """One row for each missing place on the path of a task."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(arguments.pretrained, arguments.dtype, device)
    data = TaskDataModule(
        task, str(train_file(arguments.data, task)), batch_size=arguments.rows, num_train=arguments.num_train, num_validation=32,
        max_length=arguments.max_length, seed=arguments.seed, tokenizer=load_tokenizer(arguments.pretrained),
    )  # fmt: skip
    data.setup("fit")
    space, objective = DenseSpace(model), OBJECTIVES[data.objective]()
    teacher = OneCopySGD(arguments.teacher_lr, reset_every=arguments.trajectory + 1)
    norms = RowNorms(space, arguments.together)

    def batch(t: int) -> Any:
        return move_data_to_device(data.train_batch(t), device)

    # A row that comes twice would count as a pair of different rows, so the rows of a place are of one epoch.
    epoch = len(data.train_examples) // arguments.rows
    batches, after = min(arguments.batches, epoch), -(-arguments.trajectory // epoch)
    step = 0
    for number, place in enumerate(places):
        while step < place:
            teacher.step(space, objective.on(model, batch(step)), step, arguments.seed)
            step += 1
        if place not in missing:
            continue
        start, first = time.perf_counter(), (after + number) * epoch
        if arguments.biases == "fitted" and isinstance(objective, CandidateCrossEntropy):
            objective.biases = None
            objective.biases = fitted_biases(model, data.val_dataloader()[CALIBRATION], device)
        chosen = [batch(first + i) for i in range(batches)]
        with torch.no_grad():
            loss = sum(float(objective.on(model, part)()) for part in chosen) / len(chosen)
        found = collect_statistics(space, objective, chosen, row_norms_of=norms)
        measured = {"blocks": found}
        if isinstance(objective, CandidateCrossEntropy):
            measured["without_prior"] = without_prior(space, objective, chosen, found)
        yield describe(task, place, loss, measured, time.perf_counter() - start, arguments)


def train_file(data: Path, task: str) -> Path:
    """The training rows of a task in a data folder."""
    return next(path for name in ("train.jsonl", "train.jsonl.gz") if (path := data / task / name).exists())


def describe(
    task: str, step: int, loss: float, measured: dict[str, BlockStatistics], seconds: float, arguments: argparse.Namespace
) -> ledger.Row:
    """What is measured, by name, and how."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in ("output", "tasks", "minutes")}
    found = measured["blocks"]
    sums = {f"{field}_sum": float(getattr(found, field).sum()) for field in _FIELDS}
    blocks = {
        kind: {n: list(v) for n, *v in zip(s.names, *(getattr(s, f).tolist() for f in _FIELDS), strict=True)}
        for kind, s in measured.items()
    }
    return {"task": task, "step": step, "loss": loss, "rows": found.rows, "batch_size": found.batch_size, **sums,
            "seconds": round(seconds, 2), "settings": settings, **ledger.made_by(), **blocks}  # fmt: skip


def load(path: Path, kind: str = "blocks") -> dict[tuple[str, int], BlockStatistics]:
    """The statistics of a ledger, by task and step.

    Args:
        path: The ledger.
        kind: ``blocks``: as the objective has them; ``without_prior``: without the preference for some answers, of tasks without
            candidates the same as ``blocks``.
    """
    out: dict[tuple[str, int], BlockStatistics] = {}
    for row in ledger.read(path):
        blocks: dict[str, list[float]] = row[kind if kind in row else "blocks"]
        fields = dict(zip(_FIELDS, torch.tensor(list(blocks.values()), dtype=torch.float64).t().contiguous(), strict=True))
        out[row["task"], row["step"]] = BlockStatistics(
            tuple(blocks), **fields, rows=row["rows"], batch_size=row["batch_size"], loss=row["loss"]
        )
    return out


if __name__ == "__main__":
    main()

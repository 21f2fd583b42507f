"""One run of a grid: train, measure on the way, write the ledger."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import ledger, methods

FIELDS = ("stage", "method", "model", "task", "seed", "lr", "forwards_asked")


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
        return tuple(getattr(self, name) for name in FIELDS)


def release() -> None:
    """Leave the device's memory to the processes beside this one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def execute(run: Run) -> str:
    """One run; its rows reach the ledger together, at its end. Returns one line for the screen."""
    from zolightning.models import load_model
    from zolightning.modules.base import OBJECTIVES

    torch.set_num_threads(1)
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method, task = run.settings["method"], dict(run.settings["task"])
    new_tokens = task.pop("max_new_tokens", None)
    if run.stage != "final":
        task |= {"validation_file": None, "num_validation": 500}  # held-out training rows choose the learning rate
    data = task_data(yaml.safe_dump(task), run.seed, run.settings["model"])
    model = load_model(run.settings["model"], method.get("dtype", "bfloat16"), device, quantization=method.get("quantization"))
    stepper = methods.build(method["build"], model, run.lr, run.seed, method.get("arguments", {}))
    objective, rows = OBJECTIVES[data.objective](), list[ledger.Row]()
    tokens, seconds, step = 0, 0.0, 0
    for target in measured_at(run):
        start, diverged = time.perf_counter(), ""
        try:
            while stepper.forwards < target:
                batch, before = data.train_batch(step), stepper.forwards
                stepper.step(objective.on(model, to_device(batch, device)))
                tokens += int(batch["attention_mask"].sum()) * (stepper.forwards - before)
                step += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            figures = evaluate(model, data, device, new_tokens, generate=target in (0, run.forwards_asked))
        except RuntimeError as error:
            if not any(sign in str(error) for sign in ("not finite", "linalg")):  # of the optimizer, of the fit of biases
                raise
            figures, diverged = {"loss": math.nan}, str(error).splitlines()[0]
        if not (diverged or math.isfinite(figures["loss"])):
            figures, diverged = {"loss": math.nan}, "the validation loss is not finite"
        row = {name: getattr(run, name) for name in FIELDS} | {"forwards": stepper.forwards, "tokens": tokens, "seconds": round(seconds, 2)}
        row |= {"metric": data.metric, **{name: round(value, 6) for name, value in figures.items()}}
        row |= {"final": bool(diverged) or target == run.forwards_asked}
        row |= ledger.made_by()
        rows.append(row | ({"diverged": diverged} if diverged else {}))
        if diverged:
            break
    rows[-1]["wall"] = round(time.perf_counter() - begin, 1)
    ledger.append(Path(run.settings["ledger"]), *rows)
    return f"{run.stage} {run.method} {run.task} seed {run.seed} lr {run.lr:g}: loss {rows[-1]['loss']:.4f}, {rows[-1]['wall']:.0f} s"


def measured_at(run: Run) -> list[int]:
    """Forwards at which a run is measured: one that chooses a rate at its end alone, for nothing else is asked of it."""
    count = run.settings["evaluations"]
    places = [round(run.forwards_asked * i / count) for i in range(count + 1)]
    return places if run.stage == "final" else places[-1:]


@lru_cache(maxsize=8)
def task_data(task: str, seed: int, tokenizer: str) -> Any:
    """The rows of a task, read and tokenised once in each process; ``task`` is YAML."""
    from zolightning.models import load_tokenizer
    from zolightning.tasks import TaskDataModule

    data = TaskDataModule(**yaml.safe_load(task), seed=seed, tokenizer=load_tokenizer(tokenizer))
    data.setup("fit")
    return data


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors there."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, data: Any, device: torch.device, new_tokens: int | None = None, generate: bool = True
) -> dict[str, float]:
    """Figures on all validation rows; answers are cut after ``new_tokens``, where given, and left out without ``generate``."""
    from zolightning.modules.evaluation import EVALUATIONS, Context

    context = Context(data.validation_examples, data.tokenizer, new_tokens or data.task.max_new_tokens, data.metric)
    evaluation = EVALUATIONS[data.objective](context)
    for loader, batches in enumerate(data.val_dataloader()):
        for batch in batches:
            kept = batch if generate else {name: value for name, value in batch.items() if name != "prompt_ids"}
            evaluation.update(model, to_device(kept, device), loader)
    return evaluation.figures()

"""Every task from its real rows through ``zolightning fit``, ``validate`` and ``predict``, with checks of what comes out.

python -m benchmarks.tasks_smoke --pretrained FOLDER --data FOLDER --out docs/results/tasks_smoke.jsonl

DATA has a folder a task with ``train.jsonl`` and ``validation.jsonl``, plain or gzipped. Everything runs in one process, so that imports
are paid once: about a minute on a GPU. Each task adds one row to the ledger; the exit status is 1 where one of them has problems.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import nn

from benchmarks import ledger
from zolightning.cli import main as zolightning
from zolightning.models import load_model
from zolightning.modules import ZOModule
from zolightning.objectives.candidate import candidate_scores, spread
from zolightning.objectives.forward import scored_log_probs
from zolightning.tasks import TASKS, Example, TaskDataModule

TASK_NAMES = [name for name in TASKS if name != "demo"]  # its rows come with the package
SHOWN = ("accuracy", "f1")


def split_file(folder: Path, split: str) -> str:
    """The file of a split, plain or gzipped."""
    files = sorted(folder.glob(f"{split}.jsonl*"))
    if not files:
        raise ValueError(f"{folder} has no {split}.jsonl")
    return str(files[0])


def arguments(task: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """What all three subcommands are given."""
    data = Path(options.data) / task
    return [
        "--model=zolightning.ZOFinetuneModule", f"--model.pretrained={options.pretrained}", f"--model.dtype={options.dtype}",
        f"--model.optimizer={json.dumps({'lr': options.lr, 'eps': options.eps})}", "--data=zolightning.TaskDataModule",
        f"--data.task={task}", f"--data.train_file={split_file(data, 'train')}", "--data.num_train=64",
        f"--data.validation_file={split_file(data, 'validation')}", f"--data.num_validation={options.rows}",
        "--data.batch_size=8", "--data.eval_batch_size=8", "--data.calibration_rows=16", f"--data.max_length={options.max_length}",
        f"--trainer.max_steps={options.steps}", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
        f"--trainer.accelerator={options.accelerator}", f"--trainer.default_root_dir={folder}",
    ]  # fmt: skip


@torch.no_grad()
def plain_score(model: nn.Module, tokenizer: Any, prompt: str, continuation: str, max_length: int) -> float:
    """Mean log-probability of a continuation: one sequence, no padding, no cache, nothing shared with the package's own code."""
    ids = tokenizer((prompt + continuation).strip(" "), verbose=False)["input_ids"]
    scored = len(ids) - len(tokenizer(prompt.strip(" "), verbose=False)["input_ids"])
    ids = ids if len(ids) <= max_length else ids[:1] + ids[1 - max_length :]
    table = torch.tensor([ids], device=next(model.parameters()).device)
    log_probs = model(input_ids=table).logits[0, -scored - 1 : -1].log_softmax(-1)
    return float(log_probs.gather(1, table[0, -scored:, None]).mean())


@torch.no_grad()
def score_error(module: ZOModule, data: TaskDataModule, rows: int = 4) -> float:
    """Largest difference between the scores of a batch and plain ones, over the first validation rows, in float32.

    Where one forward scores all candidates, scores are known up to a constant, so log-softmaxes are compared.
    """
    model = module.language_model.float()
    batch = move_data_to_device(next(iter(data.val_dataloader()[0])), next(model.parameters()).device)
    if "candidates" in batch:
        table = candidate_scores(model, batch)
    else:
        log_prob, length = scored_log_probs(model, batch)
        table = spread(log_prob / length, batch, float("-inf"))
    worst = 0.0
    for row, index in zip(table[:rows], batch["index"].tolist(), strict=False):
        example: Example = data.validation_examples[index]
        tails = example.candidates or (f" {example.answers[0]}\n",)
        prompts = example.prompts or (example.prompt,) * len(tails)
        plain = [plain_score(model, module.tokenizer, p, c, data.max_length) for p, c in zip(prompts, tails, strict=True)]
        own, other = row[: len(tails)].double().cpu(), torch.tensor(plain, dtype=torch.float64)
        if "candidates" in batch:
            own, other = own.log_softmax(0), other.log_softmax(0)
        worst = max(worst, float((own - other).abs().max()))
    return worst


def tokens_per_row(data: TaskDataModule) -> float:
    """Mean tokens of a training sequence."""
    batch = data.train_batch(0)
    return float(batch["attention_mask"].sum() / batch["attention_mask"].shape[0])


def moved_blocks(trained: Any, base: nn.Module) -> float:
    """Share of the blocks in which a weight differs from the base model's."""
    before = dict(base.named_parameters())
    blocks = trained.space.blocks
    return sum(not torch.equal(block.tensor.cpu(), before[block.name]) for block in blocks) / len(blocks)


def run_task(task: str, options: argparse.Namespace, base: nn.Module) -> ledger.Row:
    """One row: the figures, and what is wrong with them."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder, common = Path(name), arguments(task, options, Path(name))
        fitted = zolightning(["fit", *common])
        report = next(callback for callback in fitted.trainer.callbacks if hasattr(callback, "before"))  # type: ignore[attr-defined]
        losses = [float(row["train/loss"]) for row in fitted.trainer.logger.rows() if "train/loss" in row]  # type: ignore[union-attr]
        moved, skipped = moved_blocks(fitted.model, base), fitted.model.zo_optimizer.skipped
        checked = zolightning(["validate", *common, "--ckpt_path=last"])
        after = {key.removeprefix("val/"): float(value) for key, value in checked.trainer.callback_metrics.items()}
        zolightning(["predict", *common, "--ckpt_path=last"])
        predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        took = time.perf_counter() - start
        wrong = score_error(checked.model, checked.datamodule)
        tokens = tokens_per_row(fitted.datamodule)
    expected = len(checked.datamodule.validation_examples)
    problems = [
        text
        for bad, text in (
            (len(losses) < options.steps or not all(map(math.isfinite, losses)), f"training losses {losses}"),
            (not all(map(math.isfinite, after.values())), f"figures {after}"),
            (moved < 1, f"{moved:.0%} of the blocks moved"),
            (skipped > 0, f"{skipped} steps skipped"),
            ([row["index"] for row in predictions] != list(range(expected)), f"{len(predictions)} predictions of {expected} rows"),
            (wrong > options.tolerance, f"scores differ by {wrong:.2g} from plain ones"),
        )
        if bad
    ]
    return {
        "task": task, "problems": problems, "seconds": round(took, 2), "tokens_per_row": round(tokens, 1), "steps": options.steps,
        "before": report.before, "after": after, "score_error": wrong, "dtype": options.dtype, "pretrained": Path(options.pretrained).name,
        **ledger.made_by(),
    }  # fmt: skip


def table(rows: list[ledger.Row]) -> str:
    """A line a task."""
    lines = [f"{'task':16s}{'seconds':>8s}{'tokens':>8s}{'loss':>17s}{'metric':>17s}  score error"]
    for row in rows:
        metric = next((name for name in SHOWN if name in row.get("after", {})), "")
        pair = [f"{row['before'][name]:.3f} > {row['after'][name]:.3f}" if metric else "-" for name in ("loss", metric)]
        numbers = f"{row.get('seconds', math.nan):8.1f}{row.get('tokens_per_row', math.nan):8.0f}{pair[0]:>17s}{pair[1]:>17s}"
        lines.append(f"{row['task']:16s}{numbers}  {row.get('score_error', math.nan):.1e}  {'; '.join(row['problems']) or 'ok'}")
    return "\n".join(lines)


def run_all(options: argparse.Namespace) -> list[ledger.Row]:
    """Every task in turn; what one raises is its row."""
    base, rows = load_model(options.pretrained, options.dtype), []
    for task in options.tasks:
        try:
            row = run_task(task, options, base)
        except (Exception, SystemExit) as error:  # the next task may do better
            row = {"task": task, "problems": [f"{type(error).__name__}: {error}"]}
        rows.append(row)
        print(f"{task}: {'; '.join(row['problems']) or 'ok'}", flush=True)
        if options.out:
            ledger.append(options.out, row)
    return rows


def parse(args: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", nargs="+", default=TASK_NAMES, choices=TASK_NAMES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=16, help="validation rows")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=9e-6)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--tolerance", type=float, default=2e-3, help="of scores, in nats a token")
    parser.add_argument("--out", type=Path, help="ledger: one row a task is added as it is done")
    return parser.parse_args(args)


def main() -> None:
    options = parse()
    sys.argv = sys.argv[:1]  # Lightning warns where it finds arguments of its own and of the process
    rows = run_all(options)
    print(table(rows))
    sys.exit(1 if any(row["problems"] for row in rows) else 0)


if __name__ == "__main__":
    main()

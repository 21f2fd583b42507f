"""A long run: does memory stay where it is, how large is the journal, and how long does it take to rebuild the weights from it?

    python -m benchmarks.soak --pretrained FOLDER --data FOLDER --steps 2000 20000 --out docs/results/soak.json

Each number of steps is a run of SST-2 of its own, with a journal and without validation. ``memory`` has, every ``--every`` steps, the
step and MiB: allocated on the GPU, reserved there by PyTorch, used on the whole card, resident in the process. ``growth`` is what they
have grown by, relatively, since the first tenth of the run. ``replay_s`` rebuilds the weights on the device that trained them,
``replay_cpu_s`` on a CPU, where asked for; ``equal`` says whether all bits are those of training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks import ledger
from benchmarks.three_ways import digest

MEASURES = ("allocated", "reserved", "card", "process")


class Memory(L.Callback):
    """Notes what the process holds.

    Args:
        every: Steps between two notes.
    """

    def __init__(self, every: int) -> None:
        self.every, self.notes = every, list[list[float]]()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A note."""
        if trainer.global_step % self.every == 0:
            self.notes.append([trainer.global_step, *(round(value / 2**20, 3) for value in held())])


def held() -> tuple[int, int, int, int]:
    """Bytes: on the GPU by PyTorch's tensors and by its allocator, on the whole card, resident in the process."""
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
    if not torch.cuda.is_available():
        return 0, 0, 0, resident
    free, whole = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), whole - free, resident


def growth(notes: list[list[float]]) -> dict[str, float]:
    """Relative growth of each measure from the first tenth of the run to its end."""
    early = notes[len(notes) // 10]
    return {name: round(notes[-1][i] / early[i] - 1, 5) if early[i] else 0.0 for i, name in enumerate(MEASURES, 1)}


def measure(options: argparse.Namespace, steps: int, folder: Path) -> ledger.Row:
    """One run and its replay."""
    import zolightning as zl
    from zolightning.callbacks import RunJournal
    from zolightning.models import load_model

    memory, path = Memory(min(options.every, steps)), folder / str(steps)
    optimizer = partial(zl.ZOOptimizer, lr=options.lr, eps=options.eps)
    module = zl.ZOFinetuneModule(options.pretrained, options.dtype, optimizer=optimizer)
    data = zl.TaskDataModule(
        "sst2", f"{options.data}/sst2/train.jsonl.gz", f"{options.data}/sst2/validation.jsonl", max_length=256, num_train=1000
    )
    trainer = L.Trainer(
        max_steps=steps, limit_val_batches=0, default_root_dir=path, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=False, callbacks=[RunJournal(), memory],
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    trained = digest(module.language_model)
    row: ledger.Row = {"steps": steps, "forwards": 2 * steps, "dtype": options.dtype, "seconds": round(seconds, 1)}
    row |= {"journal_bytes": (path / "journal.zo").stat().st_size, "growth": growth(memory.notes)}
    equal = []
    for name, device in (("replay_s", "cuda" if torch.cuda.is_available() else "cpu"), *options.cpu * (("replay_cpu_s", "cpu"),)):
        model = load_model(options.pretrained, options.dtype, device)
        start = time.perf_counter()
        zl.replay(path / "journal.zo", model)
        if device == "cuda":
            torch.cuda.synchronize()
        row[name] = round(time.perf_counter() - start, 2)
        equal.append(digest(model) == trained)
    return row | {"equal": all(equal), "memory": memory.notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="folder with sst2/train.jsonl.gz and sst2/validation.jsonl")
    parser.add_argument("--steps", nargs="+", type=int, default=[2000, 20000], help="of each run")
    parser.add_argument("--every", type=int, default=200, help="steps between two looks at the memory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lr", type=float, default=9e-6)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--cpu", action="store_true", help="rebuild on the CPU too")
    parser.add_argument("--out", type=Path, default=Path("docs/results/soak.json"))
    options = parser.parse_args()
    about = {**ledger.made_by(), "command": ledger.command("soak")}
    with tempfile.TemporaryDirectory() as folder:
        for steps in options.steps:
            row = measure(options, steps, Path(folder)) | about
            print(json.dumps({name: value for name, value in row.items() if name != "memory"}), flush=True)
            ledger.replace(options.out, row, ("steps", "dtype", "machine"))


if __name__ == "__main__":
    main()

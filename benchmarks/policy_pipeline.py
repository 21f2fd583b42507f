"""The whole comparison of policies, one command that goes on where it stopped.

    python -m benchmarks.policy_pipeline --pretrained FOLDER --data DATA --state docs/results/policy --minutes 9 --workers 4

It does what is not done yet, in this order, and leaves before the time is up:

1. ``statistics.jsonl``: statistics of the blocks on the design tasks (benchmarks.collect_statistics). Beside this and the next stage
   ``published.safetensors``, a run of configs/meta/published.yaml with products in TF32; stage 4 waits for it.
2. ``policy_design.jsonl``: headroom, controls and candidates on the design tasks, each policy made without the task.
3. ``chosen.json``, ``ours.safetensors``: the choice (benchmarks.choose). Here it stops until called with ``--frozen``: commit first.
4. ``policy_rest.jsonl``: the other tasks.
5. ``policy_reuse.jsonl``: the same policy on a derived checkpoint (benchmarks.derive).
6. ``policy_seen.jsonl``: all methods and seeds on the design tasks, for the whole table.

The folder ``state`` holds all that a later call needs, eight files; everything else is made again in ``work``.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import choose, collect_statistics, derive, grid, make_policies
from benchmarks.grid import gpu_name
from benchmarks.plan import Plan
from benchmarks.runs import release

ROOT = Path(__file__).parents[1]
GRIDS = ROOT / "benchmarks" / "grids"
DESIGN_TASKS = "sst2,rte,cb,boolq,squad"
PUBLISHED_MINUTES = 6.0  # a guess, on the safe side: 570 steps in float32


class Pipeline:
    """The stages, each of which knows whether it is done.

    Args:
        options: The command's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.monotonic()
        self.state, self.policies = Path(options.state), Path(options.work) / "policies"
        self.recipe_folder = Path(options.work) / "meta_published"
        self.recipe: subprocess.Popen[bytes] | None = None
        self.state.mkdir(parents=True, exist_ok=True)
        os.environ |= {"SMOLLM2": str(options.pretrained), "DATA": str(options.data), "POLICIES": str(self.policies)}

    @property
    def left(self) -> float:
        """Minutes left."""
        return float(self.options.minutes) - (time.monotonic() - self.start) / 60

    def measured(self) -> bool:
        """Statistics of all tasks, each in a process of its own; whether all are there."""
        o, work = self.options, {}
        for task in o.tasks.split(","):
            if self._places(task) < o.points:
                work[task] = [
                    "benchmarks.collect_statistics", f"--pretrained={o.pretrained}", f"--data={o.data}", f"--tasks={task}",
                    f"--batches={o.batches}", f"--points={o.points}", f"--trajectory={o.trajectory}", f"--output={self.state}",
                    f"--minutes={self.left}",
                ]  # fmt: skip
        if work:
            print("measured beside one another:", *work, flush=True)
            self._beside(work)
        return all(self._places(task) == o.points for task in o.tasks.split(","))

    def start_published(self) -> None:
        """Begin the published recipe, on the last GPU; nothing before the other tasks waits for it."""
        o, gpus = self.options, max(torch.cuda.device_count(), 1)
        if (self.state / "published.safetensors").exists() or self.left < PUBLISHED_MINUTES:
            return
        rows = collect_statistics.train_file(Path(o.data), "copa")
        options = [
            "fit", f"--config={ROOT / 'configs' / 'meta' / 'published.yaml'}", f"--model.pretrained={o.pretrained}",
            f"--data.train_file={rows}", f"--data.validation_file={rows}", f"--trainer.default_root_dir={self.recipe_folder}",
            "--trainer.enable_progress_bar=false", *o.published,
        ]  # fmt: skip
        self.recipe = self._process(gpus - 1, "zolightning", options, {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"})

    def published(self) -> bool:
        """Wait for the published recipe, as far as the time goes; whether it is there."""
        path, made = self.state / "published.safetensors", self.recipe_folder / "policy.safetensors"
        if self.recipe is not None:
            while self.recipe.poll() is None and self.left > 0:
                time.sleep(0.2)
            if status := self.recipe.poll():
                raise SystemExit(f"the published recipe failed with status {status}")
            if status == 0:
                self.recipe = None
                shutil.copy(made, path)
                self._share()
        if not path.exists():
            print("published.safetensors is missing: the published recipe needs more time", flush=True)
        return path.exists()

    def _places(self, task: str) -> int:
        """Places at which a task was measured."""
        return sum(one == task for one, _ in collect_statistics.load(self.state / "statistics.jsonl"))

    def _beside(self, work: dict[str, list[str]]) -> None:
        """Run modules as processes, spread over the GPUs, until all have ended or the time is up."""
        gpus, running = max(torch.cuda.device_count(), 1), {}
        for number, (name, (module, *options)) in enumerate(work.items()):
            running[name] = self._process(number % gpus, module, options)
        try:
            while running and self.left > 0:
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    if status := running.pop(name).returncode:
                        raise SystemExit(f"{name} failed with status {status}")
                time.sleep(0.2)
            if running:
                print("time is up", flush=True)
        finally:
            for process in running.values():
                process.kill()
                process.wait()

    @staticmethod
    def _process(gpu: int, module: str, options: Sequence[str], more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A module as a process that sees one GPU."""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu_name(gpu), **(more or {})}
        return subprocess.Popen([sys.executable, "-m", module, *options], env=environment)

    def make(self) -> bool:
        """All policies of the grids, in the work folder."""
        if not (self.policies / "curvature.json").exists():
            make_policies.main([f"--statistics={self.state / 'statistics.jsonl'}", f"--pretrained={self.options.pretrained}",
                                f"--tasks={self.options.tasks}", "--leave-out", f"--out={self.policies}"])  # fmt: skip
        self._share()
        return True

    def _share(self) -> None:
        """Put the policies of the state folder where the grids look for them."""
        self.policies.mkdir(parents=True, exist_ok=True)
        for name in ("published", "ours"):
            if (self.state / f"{name}.safetensors").exists():
                shutil.copy(self.state / f"{name}.safetensors", self.policies)

    def run(self, name: str) -> bool:
        """Run a grid as far as the time goes; whether all of it has ended."""
        config = grid.load(Path(self.options.grids) / f"{name}.yaml", self.state / f"{name}.jsonl")
        if not self._ended(config):
            print(f"{name}, {self.left:.1f} min", flush=True)
            grid.run_all(config, self.options.workers, self.left)
        return self._ended(config)

    @staticmethod
    def _ended(config: dict[str, Any]) -> bool:
        return not any(Plan(config).left())

    def choose(self) -> bool:
        """Choose ours; whether it was chosen before and is frozen."""
        chosen = (self.state / "chosen.json").exists()
        if not chosen:
            choose.main([str(Path(self.options.grids) / "policy_design.yaml"), f"--ledger={self.state / 'policy_design.jsonl'}",
                         f"--policies={self.policies}", f"--out={self.state}"])  # fmt: skip
        if not (chosen and self.options.frozen):
            print("chosen.json and ours.safetensors are there: commit them, then go on with --frozen", flush=True)
        return chosen and bool(self.options.frozen)

    def derived(self) -> bool:
        """The derived checkpoint, in the work folder."""
        o, folder = self.options, Path(self.options.work) / "derived"
        if not (folder / "digest.txt").exists():
            rows = collect_statistics.train_file(Path(o.data), "squad")
            derive.main([f"--pretrained={o.pretrained}", f"--train-file={rows}", f"--out={folder}", *o.derive])
            release()
        os.environ |= {"DERIVED": str(folder), "DERIVED_DIGEST": (folder / "digest.txt").read_text(encoding="utf-8")}
        return True

    def stages(self) -> bool:
        """All in order, up to the first that is not done."""
        self.start_published()
        return (
            self.measured() and self.make() and self.run("policy_design") and self.choose()
            and self.published() and self.run("policy_rest") and self.derived() and self.run("policy_reuse") and self.run("policy_seen")
        )  # fmt: skip


def main(options: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="folder with a folder a task")
    parser.add_argument("--state", default="docs/results/policy", help="folder of what must be kept between calls")
    parser.add_argument("--work", default="runs/policy", help="folder of what can be made again")
    parser.add_argument("--minutes", type=float, default=math.inf, help="leave after this time at the latest")
    parser.add_argument("--workers", type=int, default=4, help="processes that share a GPU")
    parser.add_argument("--frozen", action="store_true", help="the choice is committed: look at the other tasks")
    parser.add_argument("--grids", default=str(GRIDS), help="folder of the YAML files")
    parser.add_argument("--tasks", default=DESIGN_TASKS, help="design tasks")
    parser.add_argument("--batches", type=int, default=48, help="of 16 rows, at each place of the statistics")
    parser.add_argument("--trajectory", type=int, default=100, help="steps of the statistics' teacher")
    parser.add_argument("--points", type=int, default=3, help="places on its path")
    parser.add_argument("--published", nargs="*", action="extend", default=[], help="more options of the published recipe's run")
    parser.add_argument("--derive", nargs="*", action="extend", default=[], help="more options of benchmarks.derive")
    pipeline = Pipeline(parser.parse_args(options))
    try:
        done = pipeline.stages()
        pipeline.published()  # what has begun is not thrown away while there is time
    finally:
        if pipeline.recipe is not None:
            pipeline.recipe.kill()
            pipeline.recipe.wait()
    print("all is done" if done else f"to be continued; {pipeline.left:.1f} min were left", flush=True)


if __name__ == "__main__":
    main()

"""What a run says before and after: what will move, what it will cost, what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer

from zolightning.callbacks.logger import RunLogger
from zolightning.callbacks.plot import plot_run
from zolightning.models import weight_bytes

Figures = dict[str, float]
_LINES = {
    "loss": "loss (nats)",
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "f1": "F1",
    "reward": "reward",
    "loss_calibrated": "loss with the run's biases",
    "accuracy_calibrated": "accuracy with the run's biases",
    "loss_corrected": "loss, bias-corrected",
    "accuracy_corrected": "accuracy, bias-corrected",
}


class RunReport(Callback):
    """Prints an estimate before the first step and a table at the end; writes ``curves.png``."""

    def __init__(self) -> None:
        self.before: Figures = {}
        #: When training started (seconds of a monotonic clock); 0: it did not.
        self.started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate once, then print what will move and what it will cost."""
        module: Any = pl_module
        module.prepare_training()  # Lightning calls callbacks before the module itself
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.start_at(trainer.global_step)
        if trainer.global_step == 0 or not self.before:
            self.before = module.evaluate()
        if trainer.global_step == 0 and self.before and trainer.logger is not None:
            trainer.logger.log_metrics({f"val/{name}": value for name, value in self.before.items()} | {"train/forwards": 0.0}, step=0)
        if trainer.is_global_zero:
            self._estimate(trainer, module)
        self.started = time.perf_counter()

    def _estimate(self, trainer: Trainer, module: Any) -> None:
        space, forwards = module.space, module.forwards_per_step
        steps = max(trainer.max_steps - trainer.global_step - module.recorded, 0) if trainer.max_steps > 0 else 0
        weights = weight_bytes(module.language_model)
        hold = module.batch_objective().several_forwards
        both = space.pairable and not hold and module.device.type != "cpu"  # signs in one forward
        scratch = space.scratch(copies=2 if both else 1, hold=hold)
        seconds, activations = self._time_forward(module)
        seconds /= trainer.world_size
        dtype = str(space.blocks[0].dtype).removeprefix("torch.")
        lines = [
            f"moves        {len(space.blocks)} blocks, {space.numel:,} parameters, {dtype}",
            f"costs        {forwards} forwards a step, {steps:,} steps to go" + (f", {forwards * steps:,} forwards" if steps else ""),
            f"memory       weights {_size(weights)}, scratch of a probe {_size(scratch)}"
            + (f", activations {_size(activations)}" if activations else ""),
        ]
        if trainer.world_size > 1:
            lines.append(f"replicas     {trainer.world_size}, each with its share of the {trainer.strategy.replicas.mode}")  # type: ignore[attr-defined]
        if seconds and steps:
            lines.append(f"time         about {_duration(seconds * forwards * steps)} of forwards alone (one took {seconds * 1e3:.0f} ms)")
        if held_out := getattr(module.data, "held_out", 0):
            lines.append(f"validation   on {held_out:,} training rows that are held out: there are no others")
        if "constant_loss" in self.before:
            constant = f"loss {self.before['constant_loss']:.3f}, accuracy {self.before['constant_accuracy']:.3f}"
            lines.append(f"constant     always the training rows' label frequencies: {constant}")
        print("\n".join(lines), flush=True)

    @staticmethod
    @torch.no_grad()
    def _time_forward(module: Any) -> tuple[float, int]:
        """Seconds and activation bytes of one loss of the first batch; zeros without a data module."""
        if not hasattr(module.data, "train_batch"):
            return 0.0, 0
        batch = move_data_to_device(module.data.train_batch(module.trainer.global_step), module.device)
        bound = module.batch_objective().on(module.language_model, batch, module.micro_batch_size)
        cuda = module.device.type == "cuda"
        bound()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if cuda else 0
        took = []
        for _ in range(3):  # other work on the machine only ever makes one slower
            start = time.perf_counter()
            float(bound())
            took.append(time.perf_counter() - start)
        return min(took), (torch.cuda.max_memory_allocated() - held if cuda else 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, print the table, draw the curves."""
        module: Any = pl_module
        after = module.evaluate()
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        if trainer.logger is not None and after:
            metrics = {f"val/{name}": value for name, value in after.items()} | {"train/forwards": float(module.forwards)}
            trainer.logger.log_metrics(metrics, step=trainer.global_step)
            write = trainer.logger.write if isinstance(trainer.logger, RunLogger) else trainer.logger.save
            write()
        took = time.perf_counter() - self.started
        skipped = f", {module.skipped} steps skipped" if module.skipped else ""
        print(f"\n{module.steps:,} steps, {module.forwards:,} forwards{skipped}, this time {_duration(took)}")
        print_table(self.before, after)
        logger = trainer.logger
        if isinstance(logger, RunLogger) and plot_run(logger.rows(), folder / "curves.png"):
            print(f"curves       {folder / 'curves.png'}")
        print(f"metrics      {logger.path if isinstance(logger, RunLogger) else folder}")
        print(f"checkpoint   {folder / 'checkpoints' / 'last.ckpt'}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """The figures before training, for the table of a resumed run."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.before = state_dict["before"]


def print_table(before: Figures, after: Figures) -> None:
    """Figures before and after, one a line, with the constant predictor beside them."""
    lines = [(label, name) for name, label in _LINES.items() if name in after]
    if not lines:
        return
    names = ("before", "after", "constant") if before else ("", "value", "constant")
    print(" " * 32 + "".join(f"{name:>10s}" for name in names))
    for label, name in lines:
        constant = after.get(f"constant_{name.split('_')[0]}") if name.split("_")[0] in ("loss", "accuracy") else None
        cells = (before.get(name), after[name], constant)
        print(f"{label:32s}" + "".join(f"{value:10.4f}" if value is not None else f"{'':10s}" for value in cells))


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"

"""Forward-only fine-tuning as a LightningModule."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as known
from torch import Tensor, nn

from zolightning.estimators import Estimator, TwoPoint
from zolightning.models import DEMO_EPS, DEMO_LR, DType, Quantization
from zolightning.modules.base import ZOModule
from zolightning.objectives import CandidateCrossEntropy, Objective
from zolightning.optim import ZOOptimizer
from zolightning.samplers import GaussianSampler, Sampler
from zolightning.spaces import DenseSpace, Space

log = logging.getLogger("zolightning")

#: Lightning's callbacks that do not look at the weights, or do so through a checkpoint.
_KNOWN = {
    known.DeviceStatsMonitor, known.EarlyStopping, known.LearningRateMonitor, known.ModelCheckpoint, known.ModelSummary,
    known.RichModelSummary, known.RichProgressBar, known.ThroughputMonitor, known.Timer, known.TQDMProgressBar,
}  # fmt: skip
LRSchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class ZOFinetuneModule(ZOModule):
    """Fine-tunes a causal language model with forward passes only.

    Args:
        pretrained: Hub id or folder of the base model; demo: the small model that comes with the package.
        dtype: Type in which the weights are stored and computed with; ``Trainer.precision`` stays 32-true.
        space: What moves, and how a probe sees it; called with the model.
        sampler: Distribution of the directions; without it: Gaussian.
        estimator: Probes of a step and what they say; without it: two-point with one direction.
        optimizer: The step: learning rate, probe distance, seed and update rule; called with space, sampler and estimator.
        lr_scheduler: Learning rate schedule of torch.optim.lr_scheduler, stepped once per batch; called with the optimizer.
        objective: What is minimised; without it: the task's own (cross-entropy of candidates or of answer tokens).
        micro_batch_size: Examples per forward; without it: the whole batch at once.
        attn_implementation: Attention code of transformers (``sdpa``, ``eager``, ...).
        trust_remote_code: Run Python code that comes with the model.
        quantization: Store the linear maps of the layers in 4 bits (nf4, fp4) or 8 (int8), by bitsandbytes; without it: as they are
            in the files, which may be quantised already.
        double_quantization: Quantise the scales of 4-bit weights too.
        deferred_updates: Let the move of a step wait until somebody looks: validation, checkpoints, ``state_dict()``, the end of the
            run. With a low-rank sampler it waits beside the weights to the end of the window; others are made by the forwards of the
            next step, on a GPU, with the same bits. A step then passes over the weights in its forwards alone.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> module = ZOFinetuneModule("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> trainer = lightning.Trainer(max_steps=2000)
        >>> trainer.fit(module, TaskDataModule("sst2"))
    """

    replicable = True

    def __init__(
        self,
        pretrained: str,
        dtype: DType = "bfloat16",
        space: Callable[[nn.Module], Space] = DenseSpace,
        sampler: Sampler | None = None,
        estimator: Estimator | None = None,
        optimizer: Callable[[Space, Sampler, Estimator], ZOOptimizer] = ZOOptimizer,
        lr_scheduler: LRSchedulerFactory | None = None,
        objective: Objective | None = None,
        micro_batch_size: int | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        quantization: Quantization | None = None,
        double_quantization: bool = False,
        deferred_updates: bool = False,
    ) -> None:
        super().__init__(
            pretrained, dtype, space, objective, micro_batch_size, attn_implementation, trust_remote_code, quantization, double_quantization
        )
        self.sampler = sampler if sampler is not None else GaussianSampler()
        self.estimator = estimator if estimator is not None else TwoPoint()
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.deferred_updates = deferred_updates

    def configure_optimizers(self) -> Any:
        """The zeroth-order optimizer on the space's blocks, and the schedule."""
        own = self.make_optimizer is ZOOptimizer and self.pretrained == "demo"  # the defaults are for large models
        settings = {"lr": DEMO_LR, "eps": DEMO_EPS} if own else {}
        optimizer = self.make_optimizer(self.space, self.sampler, self.estimator, **settings)
        optimizer.deferred = self.deferred_updates
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("lr_scheduler: ReduceLROnPlateau waits for a metric, which a step does not have; choose a schedule over steps")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def zo_optimizer(self) -> ZOOptimizer:
        """The optimizer itself, without Lightning's wrapper."""
        return cast(ZOOptimizer, self.optimizers(use_pl_optimizer=False))

    def prepare_training(self) -> None:
        """Settle what a checkpoint and the command line both say, and what the objective needs to know beforehand."""
        super().prepare_training()
        self._prefer_own_settings()
        objective = self.batch_objective()
        if self.data is not None and hasattr(self.data, "train_examples"):
            objective.prepare(self.tokenizer, self.data.train_examples)
        if isinstance(objective, CandidateCrossEntropy) and objective.calibrate and objective.biases is None:
            objective.biases = self.fit_candidate_biases(self.data)

    def _prefer_own_settings(self) -> None:
        """The arguments of this run win over those that a checkpoint stores; a schedule goes on at its place."""
        optimizer = self.zo_optimizer
        group, own = optimizer.param_groups[0], optimizer.defaults
        for name in ("eps", "seed", "base_lr"):
            if group[name] != own[name]:
                log.warning("%s=%s instead of the checkpoint's %s", name.removeprefix("base_"), own[name], group[name])
        factor = own["base_lr"] / group["base_lr"]
        if factor != 1:
            self.scale_lr(factor)
        group.update({name: own[name] for name in ("eps", "seed", "base_lr")})

    def scale_lr(self, factor: float) -> None:
        """Multiply the learning rate, and the height of its schedule.

        Args:
            factor: What to multiply by.
        """
        group = self.zo_optimizer.param_groups[0]
        for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():  # the last three are what OneCycleLR goes by
            group[name] *= factor
        _scale_schedule(self.lr_schedulers(), factor)

    def setup(self, stage: str) -> None:
        """Refuse settings that would silently spoil the run; do not defer updates that a callback may look for."""
        super().setup(stage)
        lookers = [type(callback).__name__ for callback in self.trainer.callbacks if _may_look(callback)]  # type: ignore[attr-defined]
        if self.deferred_updates and lookers:
            log.warning("deferred_updates: no, %s may look at the weights after every step", lookers[0])
            self.deferred_updates = False

    def configure_callbacks(self) -> list[Callback]:
        """What brings deferred updates in when an exception ends the run."""
        return [_SettleOnException()] if self.deferred_updates else []

    def settle(self) -> None:
        if self.deferred_updates and self._trainer is not None and self.trainer.optimizers:
            self.zo_optimizer.settle()

    def on_train_end(self) -> None:
        """The weights are whole from here on."""
        self.settle()

    @property
    def steps(self) -> int:
        return self.zo_optimizer.steps

    @property
    def forwards(self) -> int:
        return self.zo_optimizer.forwards

    @property
    def forwards_per_step(self) -> int:
        return len(self.estimator.probes)

    @property
    def recorded(self) -> int:
        return self.zo_optimizer.recorded

    @property
    def skipped(self) -> int:
        return self.zo_optimizer.skipped

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on one batch, whatever the number of directions."""
        bound = self.batch_objective().on(self.language_model, batch, self.micro_batch_size)
        # Lightning wraps the closure, so the objective itself travels beside it.
        loss: Tensor = self.optimizers().step(bound, bound=bound)  # type: ignore[union-attr]
        scheduler = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]
        optimizer = self.zo_optimizer
        if optimizer.steps % self.trainer.log_every_n_steps and optimizer.steps != self.trainer.max_steps:  # type: ignore[attr-defined]
            return loss  # to log is to wait for the device
        assert optimizer.coefficients is not None
        self.log("step", float(optimizer.steps))  # Lightning's own count of batches is one behind here
        self.log("train/loss", loss)
        self.log("train/coefficient", optimizer.coefficients.mean())
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        self.log("train/forwards", float(optimizer.forwards))
        return loss


def _scale_schedule(scheduler: Any, factor: float) -> None:
    """Multiply the height of a schedule; those made of several (``SequentialLR``, ``ChainedScheduler``) keep theirs inside."""
    for part in getattr(scheduler, "_schedulers", ()):
        _scale_schedule(part, factor)
    for name in ("base_lrs", "max_lrs"):  # the second is CyclicLR's
        if hasattr(scheduler, name):
            setattr(scheduler, name, [lr * factor for lr in getattr(scheduler, name)])


def _may_look(callback: Callback) -> bool:
    """Whether a callback that is not known to leave the weights alone runs between steps."""
    kind = type(callback)
    harmless = kind in _KNOWN or kind.__module__.partition(".")[0] == "zolightning"
    hooks = ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end")
    return not harmless and any(getattr(kind, hook) is not getattr(Callback, hook) for hook in hooks)


class _SettleOnException(Callback):
    """Whatever ends a run, its weights are whole."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # steps that are repeated may not be looked at here
            pl_module.settle()  # type: ignore[operator]

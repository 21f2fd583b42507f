"""The journal of a Lightning run: kept, continued, and followed back."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from zolightning.journal import FILE_NAME, Back, Journal, Place, Recorder, read
from zolightning.journal.rebuild import check_weights, move_all, tools
from zolightning.journal.settings import Settings, settings_of
from zolightning.modules.finetune import ZOFinetuneModule
from zolightning.optim import Rule
from zolightning.samplers import Sampler

log = logging.getLogger("zolightning")


class RunJournal(Callback):
    """Keeps ``journal.zo`` in the run folder, and takes a run up where its journal ends.

    Steps reach the file at log lines, checkpoints and the end of the run, however that comes. A resumed run takes the steps that the
    journal has beyond the checkpoint from there: they cost no forward, and end in the same bits.

    Args:
        resume: Go on to the end of the journal. Without it a run starts afresh, or exactly at the checkpoint that it is given; later
            steps are then cut off.

    Raises:
        ValueError: The journal is damaged, of another model, or of other settings than those of the run.
    """

    def __init__(self, resume: bool = False) -> None:
        self.resume = resume
        #: Writes the journal; ``None`` outside of training and in runs of other modules.
        self.recorder: Recorder | None = None
        self._start = 0  # step at which training started
        self._saved: Place | None = None  # where the checkpoint of a resumed run stands
        self._backs: deque[Back] = deque()  # those that a resumed run still comes by

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out where to go on."""
        if not isinstance(pl_module, ZOFinetuneModule) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        pl_module.prepare_training()  # Lightning calls callbacks before the module itself
        path, self._start = Path(trainer.default_root_dir) / FILE_NAME, trainer.global_step
        journal = self._find(path, self._start)
        if journal is not None:
            self._tell_changes(journal, pl_module)
        if journal is None and self._start:
            print(f"journal      none of this checkpoint: a new one begins at step {self._start}", flush=True)
        elif journal is not None and self.resume:
            self._follow(journal, pl_module)
        elif journal is not None and journal.steps > self._start:
            print(f"journal      the steps after step {self._start} will be replaced", flush=True)
        optimizer, keep = pl_module.zo_optimizer, None if self.resume else self._start
        self.recorder = Recorder(path, optimizer, pl_module.pretrained, journal, keep, trainer.is_global_zero)

    def _find(self, path: Path, step: int) -> Journal | None:
        """The journal to go on with."""
        if not path.exists() or (step == 0 and not self.resume):
            return None
        journal = read(path)
        known = bool(journal.all_settings) and (step == 0 or (self._saved is not None and journal.knows(self._saved, step)))
        return journal if known else None

    def _tell_changes(self, journal: Journal, module: ZOFinetuneModule) -> None:
        """Say what is another setting than the one of the steps before; a checkpoint itself tells of the learning rate, eps and seed."""
        before = journal.settings_at(self._saved) if self._saved is not None else None
        if before is None:
            return
        own = settings_of(module.zo_optimizer, module.pretrained, journal.first)
        for name in ("sampler", "noise", "estimator", "queries", "rule", "weight_decay"):
            there, here = getattr(before, name), getattr(own, name)
            if there != here:
                log.warning("%s=%s instead of the run's %s so far", name, here, there)

    def _follow(self, journal: Journal, module: ZOFinetuneModule) -> None:
        """Have the optimizer take the coming steps from the journal."""
        optimizer = module.zo_optimizer
        if self._start == 0:
            check_weights(journal, module.space.blocks)
        entries = journal.entries[self._start - journal.first.start :]
        self._backs = deque(back for back in journal.backs if back.step > self._start)  # a checkpoint is written after a return
        own = settings_of(optimizer, module.pretrained, journal.first)
        for entry in entries:
            for name in ("seed", "noise", "queries", "probes", "rule", "weight_decay", "deferred"):
                there, here = getattr(entry.settings, name), getattr(own, name)
                if there != here:
                    raise ValueError(
                        f"journal {str(journal.path)!r} has steps after step {self._start} with {name}={there}, this run has {here}: "
                        "resume with the old setting, or give the checkpoint's own path to leave these steps out"
                    )
        last = module.trainer.max_steps
        if optimizer.apart and entries and 0 < last < journal.steps:
            raise ValueError(
                f"trainer.max_steps={last}, but the journal {str(journal.path)!r} has {journal.steps} steps of deferred updates: "
                "set it to at least these, or give the checkpoint's own path to leave the steps out"
            )
        if entries:
            print(f"journal      steps {self._start} to {journal.steps} are taken from it, without forwards", flush=True)
            if optimizer.param_groups[0]["form"] is None:
                optimizer.param_groups[0]["form"] = entries[-1].settings.form
            optimizer.repeat((entry.row for entry in entries), journal.looks)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write at log lines; repeat a return that the journal has."""
        if self.recorder is None or not isinstance(pl_module, ZOFinetuneModule):
            return
        if self._backs and self._backs[0].step == trainer.global_step:
            self._go_back(pl_module, self._backs.popleft())
        if trainer.global_step in pl_module.zo_optimizer.looks.recorded:
            pl_module.zo_optimizer.settle()
        if not self.recorder.opened or trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.recorder.drain()

    @property
    def repeating(self) -> bool:
        """Whether the run still takes steps from the journal."""
        return self.recorder is not None and (self.recorder.optimizer.repeating or bool(self._backs))

    def go_back(self, module: ZOFinetuneModule, back: Back) -> None:
        """Give the weights the values that they had after an earlier step, and lower the learning rate.

        Args:
            module: The module in training.
            back: From where, to where, and the factor of the learning rate.

        Raises:
            ValueError: The base model is not the one that the journal begins with.
        """
        assert self.recorder is not None
        self.recorder.go_back(back)
        self._go_back(module, back)

    def _go_back(self, module: ZOFinetuneModule, back: Back) -> None:
        assert self.recorder is not None
        journal = read(self.recorder.path)
        module.reload_base()
        check_weights(journal, module.space.blocks)
        optimizer = module.zo_optimizer
        entries, looks = journal.surviving(back.step), journal.surviving_looks(back.step)
        known, noise = tools(optimizer.sampler, optimizer.rule), self.recorder.noise

        def of(settings: Settings) -> tuple[Sampler, Rule]:
            """What a step was made with: perhaps not what the run has now."""
            sampler, rule = known(settings)
            return (optimizer.sampler if settings.noise == noise else sampler), rule

        move_all(module.space, entries, looks, back.step, of)
        if optimizer.apart and not optimizer.repeating:
            self.recorder.look(back.step)
        module.scale_lr(back.factor)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left."""
        if self.recorder is not None:
            self.recorder.drain()
            self.recorder.sync()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what can be written; the exception itself says what happened."""
        if self.recorder is None:
            return
        with contextlib.suppress(OSError, RuntimeError):  # steps that are repeated may not be looked at here
            pl_module.settle()  # type: ignore[operator]
        with contextlib.suppress(OSError, RuntimeError):  # a full disk, or a device that is gone
            self.recorder.drain()
            self.recorder.sync()
            if trainer.global_step > self._start:
                print(f"stopped at step {trainer.global_step}; --ckpt_path last goes on from there", flush=True)
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the file."""
        self._close()

    def _close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None

    def state_dict(self) -> dict[str, Any]:
        """Where a checkpoint stands in the journal; everything before it reaches the disk first."""
        if self.recorder is not None:
            self.recorder.drain()
            self.recorder.sync()
        place = self._saved if self.recorder is None else self.recorder.place
        return {} if place is None else place._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Where the checkpoint stands."""
        self._saved = Place(**state_dict) if state_dict else None

"""Lightning's CLI with the parts of this package, two more subcommands and short errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from zolightning import __version__
from zolightning.callbacks import PredictionWriter, RunCheckpoint, RunJournal, RunLogger, RunProgress, RunReport, print_table
from zolightning.export import export_model
from zolightning.journal import FILE_NAME
from zolightning.messages import reason
from zolightning.models import Quantization
from zolightning.modules import ZOModule
from zolightning.replaying import check_checkpoint, replay_run


class ZOArgumentParser(LightningArgumentParser):
    """Errors give the reason, not pages of usage; options are written out."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False} | options)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print the reason and leave with status 2."""
        if not self.exit_on_error:
            return super().error(message, ex)
        sys.stderr.write(f"error: {reason(str(message))}\n")
        sys.exit(2)

    def parse_path(self, path: Any, *arguments: Any, **options: Any) -> Any:
        """Read a configuration file; a complaint about its form names it."""
        problem = None
        try:
            if not isinstance(yaml.safe_load(Path(path).read_text(encoding="utf-8")), dict):
                problem = "it holds no settings, such as trainer: {max_steps: 100}"
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            problem = f"line {line}: {error.problem}"
        except (yaml.YAMLError, UnicodeDecodeError):
            problem = "it is no text in UTF-8"
        return self.error(f"configuration {str(path)!r}: {problem}") if problem else super().parse_path(path, *arguments, **options)


class ZOTrainer(Trainer):
    """Lightning's Trainer with two more subcommands."""

    def export(
        self,
        model: ZOModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        output: str = "export",
        merge: bool = False,
        requantize: Quantization | None = None,
    ) -> None:
        """Write the trained model as an ordinary Hugging Face folder.

        Args:
            model: The module.
            datamodule: Names the task on the model card.
            ckpt_path: Checkpoint with the trained weights, or "last" for the one of the run folder.
            weights_only: Not used: checkpoints are always read as data, never as code.
            output: Folder to write to.
            merge: Write ordinary weights instead of an adapter or packed weights: unpacked, with the adapter added.
            requantize: Merge, and quantise the result again (nf4, fp4 or int8).
        """
        model.configure_model()
        checkpoint = None
        if ckpt_path is not None:
            checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
            model.on_load_checkpoint(checkpoint)
        task = getattr(datamodule, "task", None)
        export_model(model, checkpoint, Path(output), type(task).__name__ if task is not None else "unknown", merge, requantize)
        print(f"model        {output}")

    def replay(
        self,
        model: ZOModule,
        datamodule: LightningDataModule | None = None,
        journal: str | None = None,
        until_step: int | None = None,
        verify: str | None = None,
        output: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Rebuild the trained weights from the base model and the journal of a run, bit for bit.

        Args:
            model: The module.
            datamodule: Names the task on the model card.
            journal: The journal; without it: the one of the run folder.
            until_step: Steps after which to stop; without it: all that the journal has.
            verify: Checkpoint whose weights must be those of the journal at its step.
            output: Folder to write the model to, as an ordinary Hugging Face folder.
            ckpt_path: Not used: a journal needs no checkpoint. The config.yaml of a run may name one.
            weights_only: Not used.
        """
        model.to(self.strategy.root_device)
        path = Path(journal) if journal is not None else Path(self.default_root_dir) / FILE_NAME
        replay_run(model, path, until_step, Path(verify) if verify is not None else None)
        if output is not None:
            task = getattr(datamodule, "task", None)
            export_model(model, None, Path(output), type(task).__name__ if task is not None else "unknown")
            print(f"model        {output}")


class RunConfig(SaveConfigCallback):
    """``config.yaml`` in the run folder; only training writes it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a run that is refused, at the latest by its set-up probe, must not replace the file of an earlier one."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Write the file after the first step."""
        super().setup(trainer, pl_module, "fit")


class ZOCLI(LightningCLI):
    """``fit``, ``validate``, ``test``, ``predict``, ``export`` and ``replay`` from YAML; every part is replaceable by ``class_path``."""

    _resume = False  # a run goes on to the end of its journal

    def __init__(self, args: ArgsType = None) -> None:
        arguments = sys.argv[1:] if args is None else args
        self._first = arguments[0] if isinstance(arguments, list) and arguments else None
        super().__init__(
            ZOModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=ZOTrainer,
            parser_class=ZOArgumentParser,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "default_root_dir": "runs/zolightning",
                "devices": 1,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "log_every_n_steps": 10,
            },
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "zolightning",
                "version": __version__,
                "description": "Fine-tune language models with forward passes only.",
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, ``export`` and ``replay``."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}, "replay": {"model", "datamodule"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **options: Any) -> LightningArgumentParser:
        if self._first in self.subcommands() and self._first != subcommand:  # nobody will ask this one, and it costs
            return self.init_parser(**options)
        return super()._prepare_subcommand_parser(klass, subcommand, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Checkpoints lie in the run folder and can be set under ``checkpoint``."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    def before_instantiate_classes(self) -> None:
        """Make sure that the run ends and that its folder can be written; find its last checkpoint."""
        config = self.config[self.subcommand]
        if isinstance(config.trainer.strategy, str) and "." in config.trainer.strategy:  # a class, where Lightning expects a name
            config.trainer.strategy = Namespace(class_path=config.trainer.strategy, init_args=Namespace())
        ends = (config.trainer.max_steps, config.trainer.max_epochs, config.trainer.max_time)
        if self.subcommand == "fit" and ends == (-1, None, None) and not config.trainer.fast_dev_run:
            raise ValueError("when does training end? set trainer.max_steps (or max_epochs, or max_time)")
        folder = Path(config.trainer.default_root_dir or ".")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".write").touch()
            (folder / ".write").unlink(missing_ok=True)  # several processes may do this
        except OSError as error:
            raise ValueError(f"cannot write to trainer.default_root_dir={str(folder)!r}: {error.strerror}") from error
        if self.subcommand == "replay":
            config.ckpt_path = None
        if config.get("ckpt_path") == "last":
            last = folder / "checkpoints" / "last.ckpt"
            config.ckpt_path = str(last) if last.exists() else None
            self._resume = self.subcommand == "fit"
            if config.ckpt_path is None and self._resume and (folder / FILE_NAME).exists():
                rank_zero_only(print)(f"no checkpoint in {last.parent}: going on from the journal alone", flush=True)
            elif config.ckpt_path is None and self._resume:
                rank_zero_only(print)(f"no checkpoint in {last.parent}: starting from step 0", flush=True)
            elif config.ckpt_path is None:
                raise ValueError(f"no checkpoint in {last.parent}")
        elif config.get("ckpt_path") is None and self.subcommand not in ("fit", "replay"):
            rank_zero_only(print)("no ckpt_path: this is the base model as it is", flush=True)
        if "weights_only" in config and config.weights_only is None:
            config.weights_only = True  # a checkpoint is data, never code
        if config.get("ckpt_path"):
            check_checkpoint(Path(config.ckpt_path), config.weights_only)
        if "verbose" in config:
            config.verbose = False  # the figures are printed once, below

    def instantiate_classes(self) -> None:
        """Refuse settings before any process is started for them."""
        super().instantiate_classes()
        self.model.check_trainer(self.trainer)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        folder = config.get("default_root_dir") or os.getcwd()
        if config.get("logger") in (None, True):  # figures as CSV in the run folder
            config["logger"] = RunLogger(folder, "metrics.csv" if self.subcommand == "fit" else f"{self.subcommand}.csv")
        own: list[Any] = [RunReport(), PredictionWriter()]
        if config.get("enable_progress_bar") is None and not any(isinstance(c, ProgressBar) for c in config.get("callbacks") or []):
            config["enable_progress_bar"] = self.subcommand == "fit"
            own = [RunProgress(), *own] if self.subcommand == "fit" else own
        if self.subcommand == "fit":
            own = [RunJournal(self._resume), *own]
        if config.get("enable_model_summary") is None:
            config["enable_model_summary"] = False  # the report says what moves
        return super()._instantiate_trainer(config, [*callbacks, *own])

    def _parse_ckpt_path(self) -> None:
        """The command line wins over the arguments that a checkpoint stores."""

    def after_fit(self) -> None:
        """Say so where there was nothing left to do."""
        trainer = self.trainer
        report = next(callback for callback in trainer.callbacks if isinstance(callback, RunReport))  # type: ignore[attr-defined]
        if not report.started:
            rank_zero_only(print)(f"nothing to do: the run is at step {trainer.global_step}, trainer.max_steps={trainer.max_steps}")

    def after_validate(self) -> None:
        """Print the figures."""
        self._print_figures("val/")

    def after_test(self) -> None:
        """Print the figures."""
        self._print_figures("test/")

    @rank_zero_only
    def _print_figures(self, prefix: str) -> None:
        metrics = {name.removeprefix(prefix): float(value) for name, value in self.trainer.callback_metrics.items()}
        print_table({}, metrics)

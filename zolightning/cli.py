"""The ``zolightning`` command: Lightning's CLI with short errors and a quiet screen."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from zolightning.callbacks import PredictionWriter, RunCheckpoint, RunLogger, RunProgress, RunReport, print_table
from zolightning.export import export_model
from zolightning.modules import ZOModule

_PACKAGE = Path(__file__).parent
# Lines of jsonargparse that repeat the input or the type hint instead of the reason.
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|^\s*Subtypes: |^\s*Given value( type)?: |^\s*Errors:\s*$"
    r"|Expected a <class 'NoneType'>"
)
_ECHO = re.compile(r"Type collections\.abc\.Callable\S* .*expects a function or a callable class: |\.? ?Got value: (Namespace|\{).*")
# What is said of the other alternative of a type: no news where one has failed for a reason of its own.
_OTHER = re.compile(r"Expected a <class 'str'>(\. Got value: Namespace.*)?")
# What Lightning says about every run of this kind, though nothing is wrong.
_QUIET = (
    r".*treespec, LeafSpec.*",
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*dataloader is not resumable.*",
    r".*in eval mode at the start of training.*",
    r".*exists and is not empty.*",
    r"Using ModelCheckpoint with manual optimization.*",  # pages of advice for another kind of training
    r".*was deprecated in v4.*",
    r".*skip_none parameter was deprecated.*",
    r".*validation_step.* but have no .val_dataloader.*",  # several tasks in one run have none
)


class ZOArgumentParser(LightningArgumentParser):
    """Errors give the reason, not pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print the reason and leave with status 2."""
        if not self.exit_on_error:
            return super().error(message, ex)
        sys.stderr.write(f"error: {_reason(str(message))}\n")
        sys.exit(2)


def _reason(message: str) -> str:
    """What a message of jsonargparse says, in one line."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip() and not _NOISE.search(line)]
    return _ECHO.sub("", " ".join([line for line in lines if not _OTHER.fullmatch(line)] or lines))


class ZOTrainer(Trainer):
    """Lightning's Trainer with one more subcommand."""

    def export(
        self,
        model: ZOModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        output: str = "export",
    ) -> None:
        """Write the trained model as an ordinary Hugging Face folder.

        Args:
            model: The module.
            datamodule: Names the task on the model card.
            ckpt_path: Checkpoint with the trained weights, or "last" for the one of the run folder.
            weights_only: Not used: checkpoints are always read as data, never as code.
            output: Folder to write to.
        """
        model.configure_model()
        checkpoint = None
        if ckpt_path is not None:
            if not Path(ckpt_path).is_file():
                raise ValueError(f"checkpoint {ckpt_path!r} does not exist")
            checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
            model.on_load_checkpoint(checkpoint)
            model.load_blocks(checkpoint["state_dict"])
        task = getattr(datamodule, "task", None)
        export_model(model, checkpoint, Path(output), type(task).__name__ if task is not None else "unknown")
        print(f"model        {output}")


class RunConfig(SaveConfigCallback):
    """``config.yaml`` in the run folder; only training writes it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a run that is refused, at the latest by its set-up probe, must not replace the file of an earlier one."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Write the file after the first step."""
        super().setup(trainer, pl_module, "fit")


class ZOCLI(LightningCLI):
    """``fit``, ``validate``, ``test``, ``predict`` and ``export`` from YAML; every part is replaceable by ``class_path``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ``export``."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Checkpoints lie in the run folder and can be set under ``checkpoint``."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    def before_instantiate_classes(self) -> None:
        """Find the run's last checkpoint and make sure that the run folder can be written."""
        config = self.config[self.subcommand]
        folder = Path(config.trainer.default_root_dir or ".")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".write").touch()
            (folder / ".write").unlink()
        except OSError as error:
            raise ValueError(f"cannot write to trainer.default_root_dir={str(folder)!r}: {error.strerror}") from error
        if config.get("ckpt_path") == "last":
            last = folder / "checkpoints" / "last.ckpt"
            config.ckpt_path = str(last) if last.exists() else None
            if config.ckpt_path is None and self.subcommand == "fit":
                print(f"no checkpoint in {last.parent}: starting from step 0", flush=True)
            elif config.ckpt_path is None:
                raise ValueError(f"no checkpoint in {last.parent}")
        elif config.get("ckpt_path") is None and self.subcommand != "fit":
            print("no ckpt_path: this is the base model as it is", flush=True)
        path = Path(config.get("ckpt_path") or ".")
        if path.is_file() and not is_zipfile(path):
            raise ValueError(f"checkpoint {str(path)!r} is damaged, or no checkpoint")
        if "weights_only" in config and config.weights_only is None:
            config.weights_only = True  # a checkpoint is data, never code
        if "verbose" in config:
            config.verbose = False  # the figures are printed once, below

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        folder = config.get("default_root_dir") or os.getcwd()
        if config.get("logger") in (None, True):  # figures as CSV in the run folder
            config["logger"] = RunLogger(folder, "metrics.csv" if self.subcommand == "fit" else f"{self.subcommand}.csv")
        own: list[Any] = [RunReport(), PredictionWriter()]
        if config.get("enable_progress_bar") is None and not any(isinstance(c, ProgressBar) for c in config.get("callbacks") or []):
            config["enable_progress_bar"] = self.subcommand == "fit"
            own = [RunProgress(), *own] if self.subcommand == "fit" else own
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
            print(f"nothing to do: the checkpoint is at step {trainer.global_step}, trainer.max_steps={trainer.max_steps}")

    def after_validate(self) -> None:
        """Print the figures."""
        self._print_figures("val/")

    def after_test(self) -> None:
        """Print the figures."""
        self._print_figures("test/")

    def _print_figures(self, prefix: str) -> None:
        metrics = {name.removeprefix(prefix): float(value) for name, value in self.trainer.callback_metrics.items()}
        print_table({}, metrics)


def main(args: ArgsType = None) -> ZOCLI:
    """The command, callable from Python with a list of arguments.

    Args:
        args: Command line arguments; ``None``: those of the process.

    Returns:
        The CLI object, with ``model``, ``datamodule`` and ``trainer``.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # classes of the working folder: class_path: my_file.MyClass
    be_quiet()
    try:
        return ZOCLI(
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
                "max_epochs": -1,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "log_every_n_steps": 10,
            },
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        sys.exit(2)


def run() -> None:
    """The console script: its exit status is what this returns, so nothing."""
    main()


def be_quiet() -> None:
    """Keep what is no news off the screen: Lightning's tips, loading bars, warnings that do not apply here."""
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _QUIET:
        warnings.filterwarnings("ignore", message)


def user_message(error: BaseException | None) -> str | None:
    """What to tell the user, or ``None`` where the error is a bug and deserves its traceback.

    An error that a ``raise`` of this package made, anywhere in the chain, is a message; so are Lightning's complaints about settings
    and files that are not there.
    """
    outer = error
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        deliberate = bool(frames) and (frames[-1].line or "").startswith("raise ") and _PACKAGE in Path(frames[-1].filename).parents
        if deliberate and isinstance(error, (ValueError, RuntimeError)):
            return str(error)
        error = error.__cause__ or error.__context__
    if isinstance(outer, ValueError) and str(outer).startswith("Does not validate against any of the Union subtypes"):
        return _reason(str(outer))  # jsonargparse chains the first alternative only
    return str(outer) if isinstance(outer, (FileNotFoundError, MisconfigurationException)) else None

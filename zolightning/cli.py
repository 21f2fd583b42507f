"""The ``zolightning`` command: Lightning's CLI with short errors."""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from zolightning.callbacks import RunCheckpoint
from zolightning.modules import ZOModule

_PACKAGE = Path(__file__).parent
# Lines of jsonargparse that repeat the type hint instead of the reason.
_NOISE = re.compile(r"Does not validate against any of the Union subtypes|^\s*Subtypes: |^\s*Given value type: |^\s*Errors:\s*$")


class ZOArgumentParser(LightningArgumentParser):
    """Errors give the reason, not pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print the reason and leave with status 2."""
        if not self.exit_on_error:
            return super().error(message, ex)
        lines = [line for line in str(message).splitlines() if line.strip() and not _NOISE.search(line)]
        sys.stderr.write("error: " + "\n".join(lines[:6]) + "\n")
        sys.exit(2)


class ZOCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` from YAML; every part is replaceable by ``class_path``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Checkpoints lie in the run folder and can be set under ``checkpoint``."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        if config.get("logger") in (None, True):  # metrics as CSV in the run folder, at a path that does not change
            config["logger"] = CSVLogger(save_dir=config.get("default_root_dir") or os.getcwd(), name="", version="")
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """The command line wins over the arguments that a checkpoint stores."""


def main(args: ArgsType = None) -> ZOCLI:
    """Entry point; also callable from Python with a list of arguments.

    Args:
        args: Command line arguments; ``None``: those of the process.

    Returns:
        The CLI object, with ``model``, ``datamodule`` and ``trainer``.
    """
    sys.path.insert(0, os.getcwd())  # classes of the working folder: class_path: my_file.MyClass
    try:
        return ZOCLI(
            ZOModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=ZOArgumentParser,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "default_root_dir": "runs/zolightning",
                "max_epochs": -1,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "log_every_n_steps": 10,
            },
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        sys.exit(2)


def user_message(error: BaseException | None) -> str | None:
    """What to tell the user, or ``None`` where the error is a bug and deserves its traceback.

    An error that this package raised itself, anywhere in the chain, is a message; so are Lightning's complaints about settings
    and files that are not there.
    """
    outer = error
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, (ValueError, OSError, RuntimeError)) and frames and _PACKAGE in Path(frames[-1].filename).parents:
            return str(error)
        error = error.__cause__ or error.__context__
    return str(outer) if isinstance(outer, (FileNotFoundError, MisconfigurationException)) else None


if __name__ == "__main__":
    main()

"""The ``zolightning`` command: a quick start, a quiet screen and short errors around :mod:`zolightning.command`."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zolightning.messages import user_message

if TYPE_CHECKING:
    from zolightning.command import ZOCLI

# What Lightning says about every run of this kind, though nothing is wrong.
_QUIET = (
    r".*treespec, LeafSpec.*",
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*dataloader is not resumable.*",
    r".*in eval mode at the start of training.*",
    r".*exists and is not empty.*",
    r".*add the following callbacks: \['RunJournal'\].*",  # validation and prediction keep no journal
    r".*sync_dist=True.*",  # every process has evaluated all rows
    r"Using ModelCheckpoint with manual optimization.*",  # pages of advice for another kind of training
    r".*was deprecated in v4.*",
    r".*skip_none parameter was deprecated.*",
    r".*validation_step.* but have no .val_dataloader.*",  # several tasks in one run have none
)


def main(args: list[str] | None = None) -> ZOCLI:
    """The command, callable from Python with a list of arguments.

    Args:
        args: Command line arguments; ``None``: those of the process.

    Returns:
        The CLI object, with ``model``, ``datamodule`` and ``trainer``.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # classes of the working folder: class_path: my_file.MyClass
    try:
        with _nothing_to_collect():
            from zolightning.command import ZOCLI
        be_quiet()  # not before: Lightning sets levels and filters of its own when it is imported
        return ZOCLI(args)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        rank = os.environ.get("LOCAL_RANK", "0")
        sys.stderr.write(f"error: {message}\n" if rank == "0" else f"error: replica {rank}: {message}\n")
        sys.exit(2)
    finally:
        gc.unfreeze()


def run() -> None:
    """The console script: its exit status is what this returns, so nothing."""
    try:
        main()
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, without a status
            sys.exit(128 + signal.SIGTERM)
        if stop.code == 0:  # help, a version or a configuration was printed, nothing started: taking modules apart costs a second
            sys.stdout.flush()
            os._exit(0)
        raise


def be_quiet() -> None:
    """Keep what is no news off the screen: Lightning's tips, loading bars, warnings that do not apply here."""
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a hub that cannot be reached is tried often; one line says so in the end
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it logs errors that it raises as well
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _QUIET:
        warnings.filterwarnings("ignore", message)


@contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Import without garbage collection: modules make none, and looking for it is a quarter of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what they made stays until the command ends
        if collecting:
            gc.enable()

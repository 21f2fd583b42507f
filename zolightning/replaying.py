"""Checkpoints and journals for the command: refuse what is none, rebuild the weights of a run, compare the two."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile, ZipFile

import torch

from zolightning.blocks import Block
from zolightning.journal.contents import Journal, whole
from zolightning.journal.rebuild import rebuild
from zolightning.journal.settings import built_in_rule
from zolightning.modules import ZOFinetuneModule, ZOModule
from zolightning.optim import Rule, ZOOptimizer


def check_checkpoint(path: Path, weights_only: bool) -> None:
    """Refuse what is no whole checkpoint before anything is loaded for it.

    Raises:
        ValueError: It is not there, damaged (its checksums are read), or something else.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        with ZipFile(path) as archive:
            whole = archive.testzip() is None
        content = torch.load(path, map_location="meta", weights_only=weights_only) if whole else None
    except UnpicklingError as error:
        raise ValueError(f"checkpoint {str(path)!r} holds more than data: --weights_only=false reads it if you trust it") from error
    except (BadZipFile, RuntimeError, EOFError):
        whole = False
    if not whole or not isinstance(content, dict) or not {"state_dict", "global_step", "pytorch-lightning_version"} <= content.keys():
        raise ValueError(f"checkpoint {str(path)!r} is damaged, or no checkpoint of a run")


def replay_run(module: ZOModule, path: Path, until_step: int | None, verify: Path | None) -> None:
    """Rebuild the weights of a run in a module, and say what came of it.

    Args:
        module: The module, with the settings of the run; its model is loaded here.
        path: The journal.
        until_step: Steps after which to stop; ``None``: all, or those of the checkpoint.
        verify: Checkpoint to compare with.

    Raises:
        ValueError: The module is of another kind, journal or checkpoint are damaged, or they do not belong together.
    """
    if not isinstance(module, ZOFinetuneModule):
        raise ValueError(f"only the runs of ZOFinetuneModule have a journal, not those of {type(module).__name__}")
    journal, checkpoint = whole(path), None
    if journal.torn:
        print(f"journal      the last {journal.torn:,} bytes were not written whole and are left out", flush=True)
    if verify is not None:
        check_checkpoint(verify, True)
        checkpoint = torch.load(verify, map_location="cpu", weights_only=True)
        step = int(checkpoint["global_step"])
        if until_step not in (None, step):
            raise ValueError(f"checkpoint {str(verify)!r} is of step {step}, until_step={until_step} is another one")
        until_step = step
    module.configure_model()
    steps = rebuild(journal, module.space, until_step, module.sampler, _rule(journal, module))
    print(f"weights      of step {steps:,}, rebuilt from {path}", flush=True)
    if checkpoint is not None:
        _compare(module.space.blocks, checkpoint["state_dict"], str(verify))
        print(f"verified     {verify} holds the same weights, bit for bit", flush=True)


def _rule(journal: Journal, module: ZOFinetuneModule) -> Rule | None:
    """The module's own update rule, where the journal needs it."""
    if all(built_in_rule(settings) is not None for settings in journal.all_settings):
        return None
    optimizers = module.configure_optimizers()
    optimizer: ZOOptimizer = optimizers["optimizer"] if isinstance(optimizers, dict) else optimizers
    return optimizer.rule


def _compare(blocks: tuple[Block, ...], state: dict[str, torch.Tensor], name: str) -> None:
    for block in blocks:
        there, here = state.get(f"model.{block.name}"), block.tensor.detach().cpu()
        if there is None or (there.dtype, there.shape) != (here.dtype, here.shape):
            raise ValueError(f"checkpoint {name!r} is of another model or space: block {block.name!r} is missing or another one")
        different = int((there.reshape(-1).view(torch.uint8) != here.reshape(-1).view(torch.uint8)).view(here.numel(), -1).any(1).sum())
        if different:
            raise ValueError(
                f"checkpoint {name!r} is not what its journal says: {different:,} of {here.numel():,} elements of "
                f"block {block.name!r} differ"
            )

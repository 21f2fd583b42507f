"""What a user is told when something is wrong: one line."""

from __future__ import annotations

import errno
import re
import traceback
from pathlib import Path

_PACKAGE = Path(__file__).parent
# Lines of jsonargparse that repeat the input or the type hint instead of the reason.
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|^\s*Subtypes: |^\s*Given value( type)?: |^\s*Errors:\s*$"
    r"|Expected a <class 'NoneType'>"
)
_ECHO = re.compile(r"Type collections\.abc\.Callable\S* .*expects a function or a callable class: |\.? ?Got value: (Namespace|\{).*")
# What is said of the other alternative of a type: no news where one has failed for a reason of its own.
_OTHER = re.compile(r"Expected a <class 'str'>(\. Got value: Namespace.*)?|Expected a path but .* either not accessible or invalid")


def reason(message: str) -> str:
    """What a message of jsonargparse says, in one line."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip() and not _NOISE.search(line)]
    return _ECHO.sub("", " ".join([line for line in lines if not _OTHER.fullmatch(line)] or lines))


def user_message(error: BaseException | None) -> str | None:
    """What to tell the user, or ``None`` where the error is a bug and deserves its traceback.

    An error that a ``raise`` of this package made, anywhere in the chain, is a message; so are Lightning's complaints about settings
    and files that are not there.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.trainer import connectors

    outer, places = error, (_PACKAGE, Path(connectors.__file__).parent)
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        deliberate = (
            bool(frames) and (frames[-1].line or "").startswith("raise ") and any(p in Path(frames[-1].filename).parents for p in places)
        )
        if deliberate and isinstance(error, (ValueError, RuntimeError)):
            return str(error)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return "no space left on the disk: what was written before is as it was"
        error = error.__cause__ or error.__context__
    if isinstance(outer, ValueError) and str(outer).startswith("Does not validate against any of the Union subtypes"):
        return reason(str(outer))  # jsonargparse chains the first alternative only
    return str(outer) if isinstance(outer, (FileNotFoundError, MisconfigurationException)) else None

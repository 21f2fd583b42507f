"""Lightning callbacks."""

from zolightning.callbacks.checkpoint import RunCheckpoint

__all__ = ["RunCheckpoint"]

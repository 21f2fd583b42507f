"""What moves, and how a probe sees it."""

from zolightning.spaces.base import SetupReport, Space
from zolightning.spaces.dense import DenseSpace

__all__ = ["DenseSpace", "SetupReport", "Space"]

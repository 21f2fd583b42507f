"""Lightning callbacks and the logger of a run."""

from zolightning.callbacks.checkpoint import RunCheckpoint
from zolightning.callbacks.logger import RunLogger
from zolightning.callbacks.predictions import PredictionWriter
from zolightning.callbacks.progress import RunProgress
from zolightning.callbacks.report import RunReport, print_table

__all__ = ["PredictionWriter", "RunCheckpoint", "RunLogger", "RunProgress", "RunReport", "print_table"]

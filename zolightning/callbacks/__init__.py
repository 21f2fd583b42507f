"""Lightning callbacks and the logger of a run."""

from zolightning.callbacks.checkpoint import RunCheckpoint
from zolightning.callbacks.divergence import Divergence
from zolightning.callbacks.journal import RunJournal
from zolightning.callbacks.logger import RunLogger
from zolightning.callbacks.predictions import PredictionWriter
from zolightning.callbacks.progress import RunProgress
from zolightning.callbacks.report import RunReport, print_table

__all__ = ["Divergence", "PredictionWriter", "RunCheckpoint", "RunJournal", "RunLogger", "RunProgress", "RunReport", "print_table"]

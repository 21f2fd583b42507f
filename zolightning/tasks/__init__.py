"""Tasks: rows become prompts and continuations, those become token batches."""

from .base import Example, Task
from .data import TaskDataModule
from .encoding import Collator, Encoded, encode, encode_example
from .multi import MultiTaskDataModule
from .registry import TASKS, get_task
from .steps import StepKeyedSampler
from .template import TemplateTask

__all__ = [
    "TASKS",
    "Collator",
    "Encoded",
    "Example",
    "MultiTaskDataModule",
    "StepKeyedSampler",
    "Task",
    "TaskDataModule",
    "TemplateTask",
    "encode",
    "encode_example",
    "get_task",
]

"""The table of tasks by short name."""

from __future__ import annotations

from .answers import DROP, SQuAD
from .base import Task
from .choice import COPA, ReCoRD
from .classification import CB, RTE, SST2, WSC, BoolQ, MultiRC, RottenTomatoes, WiC
from .demo import Demo

TASKS: dict[str, type[Task]] = {
    "sst2": SST2,
    "rte": RTE,
    "cb": CB,
    "boolq": BoolQ,
    "wsc": WSC,
    "wic": WiC,
    "multirc": MultiRC,
    "copa": COPA,
    "record": ReCoRD,
    "squad": SQuAD,
    "drop": DROP,
    "rotten_tomatoes": RottenTomatoes,
    "demo": Demo,
}


def get_task(name: str | Task) -> Task:
    """Look a task up.

    Args:
        name: Short name, or a task, which is returned as it is.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> get_task("sst2").metric
        'accuracy'
    """
    if isinstance(name, Task):
        return name
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]()

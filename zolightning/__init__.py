"""zolightning: fine-tune large language models with forward passes only.

The names here are the public surface. They are loaded on first use, so that ``zolightning --help`` and a sampler of your own
start without transformers and Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "CandidateCrossEntropy": "objectives",
    "DenseSpace": "spaces",
    "Estimator": "estimators",
    "GaussianSampler": "samplers",
    "Objective": "objectives",
    "RademacherSampler": "samplers",
    "Rule": "optim",
    "SGD": "optim",
    "Sampler": "samplers",
    "Space": "spaces",
    "Task": "tasks",
    "TaskDataModule": "tasks",
    "TemplateTask": "tasks",
    "TokenCrossEntropy": "objectives",
    "TwoPoint": "estimators",
    "ZOFinetuneModule": "modules",
    "ZOModule": "modules",
    "ZOOptimizer": "optim",
}

__all__ = [*_HOME, "testing"]

if TYPE_CHECKING:
    from zolightning import testing
    from zolightning.estimators import Estimator, TwoPoint
    from zolightning.modules import ZOFinetuneModule, ZOModule
    from zolightning.objectives import CandidateCrossEntropy, Objective, TokenCrossEntropy
    from zolightning.optim import SGD, Rule, ZOOptimizer
    from zolightning.samplers import GaussianSampler, RademacherSampler, Sampler
    from zolightning.spaces import DenseSpace, Space
    from zolightning.tasks import Task, TaskDataModule, TemplateTask


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("zolightning.testing")
    if name in _HOME:
        return getattr(importlib.import_module(f"zolightning.{_HOME[name]}"), name)
    raise AttributeError(f"module 'zolightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

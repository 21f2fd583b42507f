"""zolightning: fine-tune large language models with forward passes only.

The names here are the public surface. They are loaded on first use, so that ``zolightning --help`` and a sampler of your own
start without transformers and Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AdapterSpace": "spaces",
    "AfterStep": "modules",
    "CandidateCrossEntropy": "objectives",
    "ClosedForm": "modules",
    "DenseSpace": "spaces",
    "Estimator": "estimators",
    "ExpectedDecrease": "modules",
    "GaussianSampler": "samplers",
    "LowRankSampler": "samplers",
    "LowRankSpace": "spaces",
    "MetaObjective": "modules",
    "MomentumSGD": "modules",
    "MultiTaskDataModule": "tasks",
    "Objective": "objectives",
    "OneCopySGD": "modules",
    "Policy": "policies",
    "PolicyMetaTrainModule": "modules",
    "PolicySampler": "samplers",
    "QuantScaleSpace": "spaces",
    "RademacherSampler": "samplers",
    "ReplicaStrategy": "strategies",
    "Reward": "objectives",
    "Rule": "optim",
    "SGD": "optim",
    "Sampler": "samplers",
    "Space": "spaces",
    "Task": "tasks",
    "TaskDataModule": "tasks",
    "Teacher": "modules",
    "TemplateTask": "tasks",
    "TokenCrossEntropy": "objectives",
    "TwoPoint": "estimators",
    "UnionSpace": "spaces",
    "ZOFinetuneModule": "modules",
    "ZOModule": "modules",
    "ZOOptimizer": "optim",
    "ZerothOrder": "modules",
    "replay": "journal",
}

__all__ = [*_HOME, "testing"]

if TYPE_CHECKING:
    import zolightning.testing as testing
    from zolightning.estimators import Estimator as Estimator
    from zolightning.estimators import TwoPoint as TwoPoint
    from zolightning.journal import replay as replay
    from zolightning.modules import AfterStep as AfterStep
    from zolightning.modules import ClosedForm as ClosedForm
    from zolightning.modules import ExpectedDecrease as ExpectedDecrease
    from zolightning.modules import MetaObjective as MetaObjective
    from zolightning.modules import MomentumSGD as MomentumSGD
    from zolightning.modules import OneCopySGD as OneCopySGD
    from zolightning.modules import PolicyMetaTrainModule as PolicyMetaTrainModule
    from zolightning.modules import Teacher as Teacher
    from zolightning.modules import ZerothOrder as ZerothOrder
    from zolightning.modules import ZOFinetuneModule as ZOFinetuneModule
    from zolightning.modules import ZOModule as ZOModule
    from zolightning.objectives import CandidateCrossEntropy as CandidateCrossEntropy
    from zolightning.objectives import Objective as Objective
    from zolightning.objectives import Reward as Reward
    from zolightning.objectives import TokenCrossEntropy as TokenCrossEntropy
    from zolightning.optim import SGD as SGD
    from zolightning.optim import Rule as Rule
    from zolightning.optim import ZOOptimizer as ZOOptimizer
    from zolightning.policies import Policy as Policy
    from zolightning.samplers import GaussianSampler as GaussianSampler
    from zolightning.samplers import LowRankSampler as LowRankSampler
    from zolightning.samplers import PolicySampler as PolicySampler
    from zolightning.samplers import RademacherSampler as RademacherSampler
    from zolightning.samplers import Sampler as Sampler
    from zolightning.spaces import AdapterSpace as AdapterSpace
    from zolightning.spaces import DenseSpace as DenseSpace
    from zolightning.spaces import LowRankSpace as LowRankSpace
    from zolightning.spaces import QuantScaleSpace as QuantScaleSpace
    from zolightning.spaces import Space as Space
    from zolightning.spaces import UnionSpace as UnionSpace
    from zolightning.strategies import ReplicaStrategy as ReplicaStrategy
    from zolightning.tasks import MultiTaskDataModule as MultiTaskDataModule
    from zolightning.tasks import Task as Task
    from zolightning.tasks import TaskDataModule as TaskDataModule
    from zolightning.tasks import TemplateTask as TemplateTask


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("zolightning.testing")
    if name in _HOME:
        return getattr(importlib.import_module(f"zolightning.{_HOME[name]}"), name)
    raise AttributeError(f"module 'zolightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

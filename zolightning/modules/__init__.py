"""LightningModules."""

from zolightning.modules.base import ZOModule
from zolightning.modules.finetune import ZOFinetuneModule
from zolightning.modules.meta import PolicyMetaTrainModule
from zolightning.modules.meta_objectives import AfterStep, ClosedForm, ExpectedDecrease, MetaObjective, MetaPoint, Verdict
from zolightning.modules.statistics import BlockStatistics, collect_statistics
from zolightning.modules.teacher import MomentumSGD, OneCopySGD, Teacher, ZerothOrder

__all__ = [
    "AfterStep",
    "BlockStatistics",
    "ClosedForm",
    "ExpectedDecrease",
    "MetaObjective",
    "MetaPoint",
    "MomentumSGD",
    "OneCopySGD",
    "PolicyMetaTrainModule",
    "Teacher",
    "Verdict",
    "ZOFinetuneModule",
    "ZOModule",
    "ZerothOrder",
    "collect_statistics",
]

"""LightningModules."""

from zolightning.modules.base import ZOModule
from zolightning.modules.finetune import ZOFinetuneModule
from zolightning.modules.meta import PolicyMetaTrainModule
from zolightning.modules.meta_objectives import AfterStep, ClosedForm, ExpectedDecrease, MetaObjective, MetaPoint, Verdict
from zolightning.modules.scale_rules import ByLoss, LargestDecrease, Ratio, ScaleRule, SharedRatio, UpperHalf
from zolightning.modules.statistics import BlockStatistics, collect_statistics
from zolightning.modules.teacher import MomentumSGD, OneCopySGD, Teacher, ZerothOrder

__all__ = [
    "AfterStep",
    "BlockStatistics",
    "ByLoss",
    "ClosedForm",
    "ExpectedDecrease",
    "LargestDecrease",
    "MetaObjective",
    "MetaPoint",
    "MomentumSGD",
    "OneCopySGD",
    "PolicyMetaTrainModule",
    "Ratio",
    "ScaleRule",
    "SharedRatio",
    "Teacher",
    "UpperHalf",
    "Verdict",
    "ZOFinetuneModule",
    "ZOModule",
    "ZerothOrder",
    "collect_statistics",
]

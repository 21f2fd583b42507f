"""Per-block scales: what decides how much each block is perturbed and moved."""

from zolightning.policies import controls
from zolightning.policies.base import Policy
from zolightning.policies.feature_policy import FeaturePolicy
from zolightning.policies.features import Features
from zolightning.policies.layout import BlockInfo, Match, match_blocks
from zolightning.policies.library import load_policy, shipped
from zolightning.policies.loss_table import LossTable
from zolightning.policies.normalise import Normaliser
from zolightning.policies.pert_nn import PertNN
from zolightning.policies.published import import_published
from zolightning.policies.show import multipliers, picture, settled, text_table
from zolightning.policies.table import Table
from zolightning.policies.uniform import Uniform

__all__ = [
    "BlockInfo",
    "FeaturePolicy",
    "Features",
    "LossTable",
    "Match",
    "Normaliser",
    "PertNN",
    "Policy",
    "Table",
    "Uniform",
    "controls",
    "import_published",
    "load_policy",
    "match_blocks",
    "multipliers",
    "picture",
    "settled",
    "shipped",
    "text_table",
]

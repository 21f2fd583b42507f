"""LightningModules."""

from zolightning.modules.base import ZOModule
from zolightning.modules.finetune import ZOFinetuneModule

__all__ = ["ZOFinetuneModule", "ZOModule"]

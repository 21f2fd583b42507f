"""What moves, and how a probe sees it."""

from zolightning.spaces.adapters import AdapterSpace
from zolightning.spaces.base import SetupReport, Space
from zolightning.spaces.dense import DenseSpace
from zolightning.spaces.low_rank import LowRankSpace
from zolightning.spaces.quant_scales import QuantScaleSpace
from zolightning.spaces.union import UnionSpace

__all__ = ["AdapterSpace", "DenseSpace", "LowRankSpace", "QuantScaleSpace", "SetupReport", "Space", "UnionSpace"]

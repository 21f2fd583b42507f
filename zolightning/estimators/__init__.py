"""Estimators of the gradient from loss values."""

from zolightning.estimators.base import Estimator, Probe
from zolightning.estimators.two_point import TwoPoint

__all__ = ["Estimator", "Probe", "TwoPoint"]

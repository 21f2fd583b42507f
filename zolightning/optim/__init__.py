"""The optimizer and its update rules."""

from zolightning.optim.optimizer import ZOOptimizer
from zolightning.optim.replicas import ReplicaLostError, Replicas
from zolightning.optim.rules import SGD, Move, Rule

__all__ = ["SGD", "Move", "ReplicaLostError", "Replicas", "Rule", "ZOOptimizer"]

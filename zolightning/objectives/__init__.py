"""What is minimised: per-row losses of a batch."""

from zolightning.objectives.base import BoundObjective, Objective, total
from zolightning.objectives.calibration import Figures, candidate_figures, constant_figures, fit_biases
from zolightning.objectives.candidate import CandidateCrossEntropy, candidate_scores
from zolightning.objectives.reward import REWARDS, Reward
from zolightning.objectives.tokens import TokenCrossEntropy

__all__ = [
    "REWARDS",
    "BoundObjective",
    "CandidateCrossEntropy",
    "Figures",
    "Objective",
    "Reward",
    "TokenCrossEntropy",
    "candidate_figures",
    "candidate_scores",
    "constant_figures",
    "fit_biases",
    "total",
]

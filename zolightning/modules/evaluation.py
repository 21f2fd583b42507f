"""Collect what validation batches say and turn it into figures: raw, corrected, and beside the constant predictor."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from zolightning.objectives.batch import Batch
from zolightning.objectives.calibration import candidate_figures, constant_figures, fit_biases
from zolightning.objectives.candidate import candidate_scores, spread
from zolightning.objectives.forward import scored_log_probs
from zolightning.objectives.tokens import TokenCrossEntropy

VALIDATION, CALIBRATION = 0, 1


class CandidateEvaluation:
    """Figures of a task with candidates.

    The first loader holds the rows to report on, the second training rows for refitting the candidate biases.
    """

    def __init__(self) -> None:
        self._scores: dict[int, list[Tensor]] = defaultdict(list)
        self._labels: dict[int, list[Tensor]] = defaultdict(list)

    def update(self, model: nn.Module, batch: Batch, loader: int = VALIDATION) -> Tensor:
        """Score one batch; returns the scores, ``[B, K]``."""
        scores = candidate_scores(model, batch)
        self._scores[loader].append(scores)
        self._labels[loader].append(batch["label"])
        return scores

    def figures(self) -> dict[str, float]:
        """``loss`` and ``accuracy``; with calibration rows also ``*_corrected`` and ``constant_*``."""
        scores, labels = _stack(self._scores[VALIDATION]), torch.cat(self._labels[VALIDATION])
        raw = candidate_figures(scores, labels)
        figures = {"loss": raw.loss, "accuracy": raw.accuracy}
        if self._scores[CALIBRATION]:
            fit_scores, fit_labels = _stack(self._scores[CALIBRATION]), torch.cat(self._labels[CALIBRATION])
            corrected = candidate_figures(scores, labels, fit_biases(fit_scores, fit_labels))
            constant = constant_figures(fit_labels, labels, scores.shape[1])
            figures |= {"loss_corrected": corrected.loss, "accuracy_corrected": corrected.accuracy}
            figures |= {"constant_loss": constant.loss, "constant_accuracy": constant.accuracy}
        return figures


class GoldEvaluation:
    """Figures of a task that is trained on the right candidate alone: its loss per token, and how often it scores best."""

    def __init__(self) -> None:
        self._loss: list[tuple[Tensor, Tensor]] = []
        self._hits: list[Tensor] = []

    def update(self, model: nn.Module, batch: Batch, loader: int = VALIDATION) -> Tensor:
        """Score one batch; returns the length-normalised scores, ``[B, K]``."""
        log_prob, length = scored_log_probs(model, batch)
        gold = batch["choice"] == batch["label"][batch["example"]]
        self._loss.append((-log_prob[gold].double().sum(), length[gold].double().sum()))
        scores, correct = spread(log_prob / length, batch, float("-inf")), spread(batch["correct"].to(log_prob.dtype), batch, 0.0)
        self._hits.append(correct.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1))
        return scores

    def figures(self) -> dict[str, float]:
        """``loss`` in nats per token of the right candidate, and ``accuracy``."""
        loss, weight = (sum(part) for part in zip(*self._loss, strict=True))
        return {"loss": float(loss / weight), "accuracy": float(torch.cat(self._hits).double().mean())}


class TokenEvaluation:
    """Loss per answer token."""

    def __init__(self) -> None:
        self._objective = TokenCrossEntropy()
        self._parts: list[tuple[Tensor, Tensor]] = []

    def update(self, model: nn.Module, batch: Batch, loader: int = VALIDATION) -> Tensor:
        """Score one batch; returns the loss of each example, ``[B]``."""
        loss, weight = self._objective.rows(model, batch)
        self._parts.append((loss.double().sum(), weight.double().sum()))
        return loss / weight

    def figures(self) -> dict[str, float]:
        """``loss`` in nats per token."""
        loss, weight = (sum(part) for part in zip(*self._parts, strict=True))
        return {"loss": float(loss / weight)}


Evaluation = CandidateEvaluation | GoldEvaluation | TokenEvaluation
#: By the way a task is trained.
EVALUATIONS: dict[str, type[Evaluation]] = {"candidates": CandidateEvaluation, "gold": GoldEvaluation, "answer": TokenEvaluation}


def _stack(scores: list[Tensor]) -> Tensor:
    """Concatenate scores of batches with different numbers of candidates."""
    width = max(part.shape[1] for part in scores)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=float("-inf")) for part in scores])

"""Collect what validation batches say and turn it into figures: raw, corrected, and beside the constant predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from zolightning.objectives.base import Objective
from zolightning.objectives.batch import Batch
from zolightning.objectives.calibration import candidate_figures, constant_figures, fit_biases
from zolightning.objectives.candidate import candidate_scores, spread
from zolightning.objectives.forward import scored_log_probs
from zolightning.objectives.generate import generate_text
from zolightning.objectives.reward import Reward, squad_scores

VALIDATION, CALIBRATION = 0, 1
Prediction = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What an evaluation may need besides the batches.

    Args:
        examples: The evaluated rows as text; ``batch["index"]`` points into them.
        tokenizer: The model's tokenizer.
        max_new_tokens: Most tokens to generate.
        metric: ``accuracy``, ``f1`` or ``exact_match``.
        biases: Candidate biases that belong to the run, ``[K]``.
        reward: The run's objective where it is a reward: predictions are judged by it as well.
    """

    examples: Sequence[Any] = ()
    tokenizer: Any = None
    max_new_tokens: int = 50
    metric: str = "accuracy"
    biases: Tensor | None = None
    reward: Reward | None = None


class Evaluation(ABC):
    """One pass over the evaluation batches."""

    def __init__(self, context: Context | None = None) -> None:
        self.context = context if context is not None else Context()
        self._rewards: list[float] = []

    @abstractmethod
    def update(self, model: nn.Module, batch: Batch, loader: int = VALIDATION) -> list[Prediction]:
        """Score one batch; returns one prediction per example, ready for JSON."""

    def judge(self, kind: str, indices: Sequence[int], predictions: Sequence[str]) -> None:
        """Let the run's reward judge predictions, if it is made for predictions of that kind."""
        reward, examples = self.context.reward, self.context.examples
        if reward is not None and reward.predict == kind and examples:
            self._rewards += reward.rewards(predictions, [examples[index] for index in indices])

    def reward_figures(self) -> dict[str, float]:
        """``reward``, where there is one."""
        return {"reward": sum(self._rewards) / len(self._rewards)} if self._rewards else {}

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """The figures of all batches so far: ``loss`` in nats, metrics from 0 to 1."""

    def text(self, index: int, choice: int) -> str | None:
        """The candidate's text, stripped, where the rows are at hand."""
        return self.context.examples[index].candidates[choice].strip() if self.context.examples else None


class CandidateEvaluation(Evaluation):
    """Figures of a task with candidates.

    The first loader holds the rows to report on, the second training rows for refitting the candidate biases. ``loss`` and
    ``accuracy`` are raw; ``*_corrected`` are with the biases refitted now; ``*_calibrated`` with the biases of the run;
    ``constant_*`` are those of the constant predictor.
    """

    def __init__(self, context: Context | None = None) -> None:
        super().__init__(context)
        self._scores: dict[int, list[Tensor]] = defaultdict(list)
        self._labels: dict[int, list[Tensor]] = defaultdict(list)

    def update(self, model: nn.Module, batch: Batch, loader: int = VALIDATION) -> list[Prediction]:
        scores = candidate_scores(model, batch)
        self._scores[loader].append(scores)
        self._labels[loader].append(batch["label"])
        if loader != VALIDATION or "index" not in batch:
            return []
        shifted = scores if self.context.biases is None else scores + self.context.biases.to(scores)
        rows = list(zip(batch["index"].tolist(), batch["label"].tolist(), torch.softmax(shifted, dim=1).tolist(), strict=True))
        if self.context.examples:
            chosen = zip(batch["index"].tolist(), scores.argmax(dim=1).tolist(), strict=True)
            self.judge("choose", batch["index"].tolist(), [self.context.examples[i].candidates[choice] for i, choice in chosen])
        out = []
        for index, label, probabilities in rows:
            choice = max(range(len(probabilities)), key=probabilities.__getitem__)
            out.append(
                {"index": index, "prediction": choice, "text": self.text(index, choice), "label": label, "probabilities": probabilities}
            )
        return out

    def figures(self) -> dict[str, float]:
        scores, labels = _stack(self._scores[VALIDATION]), torch.cat(self._labels[VALIDATION])
        if bool((labels < 0).any()):
            return {}
        raw = candidate_figures(scores, labels)
        figures = {"loss": raw.loss, "accuracy": raw.accuracy, **self.reward_figures()}
        if self.context.biases is not None:
            own = candidate_figures(scores, labels, self.context.biases.double().cpu())
            figures |= {"loss_calibrated": own.loss, "accuracy_calibrated": own.accuracy}
        if self._scores[CALIBRATION]:
            fit_scores, fit_labels = self.calibration_rows()
            corrected = candidate_figures(scores, labels, fit_biases(fit_scores, fit_labels))
            constant = constant_figures(fit_labels, labels, scores.shape[1])
            figures |= {"loss_corrected": corrected.loss, "accuracy_corrected": corrected.accuracy}
            figures |= {"constant_loss": constant.loss, "constant_accuracy": constant.accuracy}
        return figures

    def calibration_rows(self) -> tuple[Tensor, Tensor]:
        """Scores ``[N, K]`` and labels ``[N]`` of the training rows."""
        return _stack(self._scores[CALIBRATION]), torch.cat(self._labels[CALIBRATION])


class GoldEvaluation(Evaluation):
    """Figures of a task that is trained on the right candidate alone: its loss per token, and how often it scores best."""

    def __init__(self, context: Context | None = None) -> None:
        super().__init__(context)
        self._loss: list[tuple[Tensor, Tensor]] = []
        self._hits: list[Tensor] = []

    def update(self, model: nn.Module, batch: Batch, loader: int = VALIDATION) -> list[Prediction]:
        log_prob, length = scored_log_probs(model, batch)
        gold = batch["choice"] == batch["label"][batch["example"]]
        self._loss.append((-log_prob[gold].double().sum(), length[gold].double().sum()))
        scores, correct = spread(log_prob / length, batch, float("-inf")), spread(batch["correct"].to(log_prob.dtype), batch, 0.0)
        chosen = scores.argmax(dim=1, keepdim=True)
        self._hits.append(correct.gather(1, chosen).squeeze(1))
        rows = list(zip(batch["index"].tolist(), chosen.squeeze(1).tolist(), batch["label"].tolist(), strict=True))
        if self.context.examples:
            self.judge("choose", [i for i, _, _ in rows], [self.context.examples[i].candidates[choice] for i, choice, _ in rows])
        return [{"index": i, "prediction": choice, "text": self.text(i, choice), "label": label} for i, choice, label in rows]

    def figures(self) -> dict[str, float]:
        loss, weight = (sum(part) for part in zip(*self._loss, strict=True))
        if float(weight) == 0:  # unlabelled rows
            return {}
        return {"loss": float(loss / weight), "accuracy": float(torch.cat(self._hits).double().mean()), **self.reward_figures()}


class AnswerEvaluation(Evaluation):
    """Loss per answer token; with prompts and a tokenizer also exact match and token F1 of greedily generated answers."""

    def __init__(self, context: Context | None = None) -> None:
        super().__init__(context)
        self._loss: list[tuple[Tensor, Tensor]] = []
        self._matches: list[tuple[float, float]] = []

    def update(self, model: nn.Module, batch: Batch, loader: int = VALIDATION) -> list[Prediction]:
        if batch["input_ids"].shape[0]:  # rows without answers have no sequence to score
            log_prob, length = scored_log_probs(model, batch)
            self._loss.append((-log_prob.double().sum(), length.double().sum()))
        if "prompt_ids" not in batch or self.context.tokenizer is None or not self.context.examples:
            return []
        texts = generate_text(model, self.context.tokenizer, batch, self.context.max_new_tokens)
        self.judge("generate", batch["index"].tolist(), texts)
        out = []
        for index, text in zip(batch["index"].tolist(), texts, strict=True):
            answers = self.context.examples[index].answers
            out.append({"index": index, "prediction": text, "answers": list(answers)})
            if answers:
                self._matches.append(squad_scores(text, answers))
        return out

    def figures(self) -> dict[str, float]:
        figures = {}
        if self._loss:
            loss, weight = (sum(part) for part in zip(*self._loss, strict=True))
            figures["loss"] = float(loss / weight)
        if self._matches:
            exact, overlap = (sum(part) / len(self._matches) for part in zip(*self._matches, strict=True))
            figures |= {"exact_match": exact, "f1": overlap}
        return figures | self.reward_figures()


class LossEvaluation(Evaluation):
    """The loss of the run's objective on batches that come without a task."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self._loss: list[tuple[Tensor, Tensor]] = []

    def update(self, model: nn.Module, batch: Batch, loader: int = VALIDATION) -> list[Prediction]:
        loss, weight = self.objective.rows(model, batch)
        self._loss.append((loss.double().sum(), weight.double().sum()))
        return []

    def figures(self) -> dict[str, float]:
        if not self._loss:
            return {}
        loss, weight = (sum(part) for part in zip(*self._loss, strict=True))
        return {"loss": float(loss / weight)}


@torch.no_grad()
def fitted_biases(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """Candidate biases that fit these rows best: float32, ``[K]``, on the device."""
    evaluation = CandidateEvaluation()
    for batch in batches:
        evaluation.update(model, move_data_to_device(batch, device), CALIBRATION)
    return fit_biases(*evaluation.calibration_rows()).to(device, torch.float32)


#: By the way a task is trained.
EVALUATIONS: dict[str, type[Evaluation]] = {"candidates": CandidateEvaluation, "gold": GoldEvaluation, "answer": AnswerEvaluation}


def _stack(scores: list[Tensor]) -> Tensor:
    """Concatenate scores of batches with different numbers of candidates."""
    width = max(part.shape[1] for part in scores)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=float("-inf")) for part in scores])

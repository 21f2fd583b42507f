"""Any number as the objective: F1, exact match, accuracy, or a function of your own. No gradient is needed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zolightning.objectives.base import Objective
from zolightning.objectives.batch import Batch
from zolightning.objectives.candidate import candidate_scores
from zolightning.objectives.generate import generate_text

RewardFunction = Callable[[str, Any], float]


def squad_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and token F1 of one prediction against the best of several answers, both 0 to 1 (normalised as SQuAD does)."""
    from torchmetrics.functional.text import squad

    target = {"answers": {"answer_start": [0] * len(answers), "text": list(answers)}, "id": "0"}
    scores = squad([{"prediction_text": prediction, "id": "0"}], [target])
    return float(scores["exact_match"]) / 100, float(scores["f1"]) / 100


def f1(prediction: str, example: Any) -> float:
    """Token F1 with the best of the accepted answers."""
    return squad_scores(prediction, example.answers)[1]


def exact_match(prediction: str, example: Any) -> float:
    """1 if the prediction is one of the accepted answers."""
    return squad_scores(prediction, example.answers)[0]


def accuracy(prediction: str, example: Any) -> float:
    """1 if the prediction is a right candidate."""
    right = example.labels or (example.label,)
    return float(any(prediction == example.candidates[index] for index in right))


REWARDS: dict[str, RewardFunction] = {"f1": f1, "exact_match": exact_match, "accuracy": accuracy}


def find_reward(reward: str | RewardFunction) -> RewardFunction:
    """A reward by name, by import path (``my_file.my_function``), or itself.

    Raises:
        ValueError: There is no such function.
    """
    if not isinstance(reward, str):
        return reward
    if reward in REWARDS:
        return REWARDS[reward]
    module, _, name = reward.rpartition(".")
    try:
        function: RewardFunction = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's file does
        raise ValueError(f"reward {reward!r} is neither one of {', '.join(REWARDS)} nor a function to import ({error})") from error
    if not callable(function):
        raise ValueError(f"reward {reward!r} is not a function")
    return function


class Reward(Objective):
    r"""Minimises one minus a reward of the model's prediction; the reward may be any number.

    .. math:: \ell = \frac{1}{B} \sum_b \left(1 - r(\text{prediction}_b, \text{example}_b)\right)

    Args:
        reward: ``f1``, ``exact_match``, ``accuracy``, or a function ``(prediction, example) -> float`` by its import path, such as
            ``my_rewards.brevity`` for a file ``my_rewards.py`` in the working folder. The example has ``prompt``, ``answers``,
            ``candidates`` and ``label``.
        predict: ``generate`` text greedily from the prompt, or ``choose`` the candidate with the best score.
        max_new_tokens: Most tokens to generate.

    Raises:
        ValueError: There is no such reward; while training: the function raises or returns something that is not a finite number.

    Example:
        >>> objective = Reward("f1")  # in YAML: {class_path: zolightning.Reward, init_args: {reward: f1}}
    """

    def __init__(
        self, reward: str | RewardFunction = "f1", predict: Literal["generate", "choose"] = "generate", max_new_tokens: int = 16
    ) -> None:
        self.function = find_reward(reward)
        self.name = reward if isinstance(reward, str) else getattr(reward, "__name__", "reward")
        self.predict: Literal["generate", "choose"] = predict
        self.max_new_tokens = max_new_tokens
        self.several_forwards, self.compares = predict == "generate", predict == "choose"
        self._tokenizer: Any = None
        self._examples: Sequence[Any] = ()

    def prepare(self, tokenizer: Any, examples: Sequence[Any]) -> None:
        self._tokenizer, self._examples = tokenizer, examples
        if self.predict == "generate" and examples[0].candidates:
            raise ValueError(
                "text is generated only for tasks with a free answer (squad, drop, or a TemplateTask with answer=...); "
                "this one has candidates: use predict='choose'"
            )
        if self.predict == "choose" and not examples[0].candidates:
            raise ValueError("predict='choose' needs a task with candidates; this one has free answers: use predict='generate'")
        if self.name in ("f1", "exact_match") and not examples[0].answers:
            raise ValueError(f"reward {self.name!r} needs a task with free answers; this one has candidates: use 'accuracy'")
        if self.name == "accuracy" and not examples[0].candidates:
            raise ValueError("reward 'accuracy' needs a task with candidates; this one has free answers: use 'exact_match' or 'f1'")

    def rows(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        examples = [self._examples[index] for index in batch["index"].tolist()]
        rewards = self.rewards(self.predictions(model, batch, examples), examples)
        loss = 1.0 - torch.tensor(rewards, dtype=torch.float32, device=batch["index"].device)
        return loss, torch.ones_like(loss)

    def predictions(self, model: nn.Module, batch: Batch, examples: Sequence[Any]) -> list[str]:
        """What the model answers, ``B`` texts."""
        if self.predict == "generate":
            return generate_text(model, self._tokenizer, batch, self.max_new_tokens)
        chosen = candidate_scores(model, batch).argmax(dim=1).tolist()
        return [example.candidates[choice] for example, choice in zip(examples, chosen, strict=True)]

    def rewards(self, predictions: Sequence[str], examples: Sequence[Any]) -> list[float]:
        """Reward of each prediction.

        Raises:
            ValueError: The function raises, or returns something that is not a finite number.
        """
        out = []
        for prediction, example in zip(predictions, examples, strict=True):
            try:
                value = float(self.function(prediction, example))
            except Exception as error:
                raise ValueError(f"reward {self.name!r} raised {type(error).__name__}: {error} (prediction {prediction!r})") from error
            if not math.isfinite(value):
                raise ValueError(f"reward {self.name!r} returned {value} for the prediction {prediction!r}")
            out.append(value)
        return out

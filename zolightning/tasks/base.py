"""What a task is: a data set whose rows become a prompt and the continuations to score after it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Objective = Literal["candidates", "gold", "answer"]
Metric = Literal["accuracy", "f1", "exact_match"]


@dataclass(frozen=True)
class Example:
    """One row of a task, as text. A continuation is appended to the prompt as it stands.

    Args:
        prompt: Text before the scored continuation.
        candidates: Continuations to choose from; empty for a free answer.
        label: Index of the right candidate; None for a free answer or a row without a label.
        answers: Accepted free answers, the training target first; it is scored as a space, the answer and a newline.
        prompts: One prompt per candidate where they differ, else empty.
        labels: Every right candidate where there may be several (ReCoRD), else empty.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int | None
    answers: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    @property
    def is_labelled(self) -> bool:
        """Whether the row says what is right."""
        return self.label is not None or bool(self.answers)


class Task(ABC):
    r"""A data set with its prompts, its training loss and its metric.

    Subclass it in one file, set the attributes and write :meth:`example`; name the class by ``class_path``.

    Attributes:
        hub: Path and configuration for ``datasets.load_dataset``; None if the rows come from the user's files only.
        objective: ``candidates``: cross-entropy over the scores of the candidates. ``gold``: language-model loss on
            the right candidate, all candidates compared in evaluation. ``answer``: language-model loss on the answer,
            generated text compared in evaluation.
        metric: ``accuracy`` of the best-scored candidate, or ``f1`` or ``exact_match`` of generated text.
        target: Column with the right answer. It may be absent from rows to predict on.
        files: Local training and validation rows that come with the task; None: from the user or the hub.
        max_new_tokens: Tokens to generate at most (``answer`` only); prompts leave room for them.

    Example:
        >>> class Spam(Task):
        ...     hub = ("ucirvine/sms_spam", None)
        ...     def example(self, row):
        ...         return Example(f"{row['sms']}\nSpam?", (" No", " Yes"), row.get("label"))
    """

    hub: tuple[str, str | None] | None = None
    files: tuple[str, str] | None = None
    objective: Objective = "candidates"
    metric: Metric = "accuracy"
    target: str = "label"
    max_new_tokens: int = 50

    @abstractmethod
    def example(self, row: Mapping[str, Any]) -> Example:
        """Turn one row of the data set into text.

        Args:
            row: Column name to value.

        Returns:
            The example; its ``label`` is None (and ``answers`` empty) if the row does not say what is right.

        Raises:
            ValueError: If a value is missing or out of range.
        """


class Row(dict[str, Any]):
    """A row that reports empty columns, and missing ones together with those that exist; ``get`` is silent.

    Example:
        >>> Row(text="fine")["label"]
        Traceback (most recent call last):
        ValueError: column 'label' is missing; the columns are: text
    """

    def __getitem__(self, column: str) -> Any:
        value = super().__getitem__(column)
        if value is None:
            raise ValueError(f"column {column!r} is empty")
        return value

    def __missing__(self, column: str) -> Any:
        raise ValueError(f"column {column!r} is missing; the columns are: {', '.join(self)}")


def class_index(value: Any, count: int) -> int | None:
    """Check a class label.

    Args:
        value: A whole number or boolean, also as 1.0 or "1", which is what files hold where other rows have no label; None, an
            empty cell or -1 (the hub's mark) for a row without a label.
        count: Number of classes.

    Returns:
        The label, or None.

    Raises:
        ValueError: If the value is not a number from 0 to ``count - 1``.

    Example:
        >>> class_index(True, 2)
        1
    """
    if value in (None, "") or value != value:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if number == -1:
        return None
    if number not in range(count):
        raise ValueError(f"label {value!r} is not a number from 0 to {count - 1}")
    return int(number)

"""Tasks with a free answer: trained on its tokens, evaluated on generated text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Example, Task


class SQuAD(Task):
    """Questions about a Wikipedia paragraph (SQuAD 1.1); metric: token F1."""

    hub = ("rajpurkar/squad", None)
    objective = "answer"
    metric = "f1"
    target = "answers"

    def example(self, row: Mapping[str, Any]) -> Example:
        """The titled paragraph and the question."""
        prompt = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"
        return Example(prompt, (), None, answers=tuple((row.get(self.target) or {}).get("text", ())))


class DROP(Task):
    """Questions that need counting or arithmetic on a passage (DROP); metric: token F1."""

    hub = ("ucinlp/drop", None)
    objective = "answer"
    metric = "f1"
    target = "answers_spans"

    def example(self, row: Mapping[str, Any]) -> Example:
        """The passage and the question."""
        prompt = f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:"
        return Example(prompt, (), None, answers=tuple((row.get(self.target) or {}).get("spans", ())))

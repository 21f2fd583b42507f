"""Tasks in which every row brings its own candidates, trained on the right one only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Example, Task, class_index


class COPA(Task):
    """Choice of plausible alternatives (SuperGLUE): which sentence is the cause or the effect of the premise?"""

    hub = ("aps/super_glue", "copa")
    objective = "gold"

    def example(self, row: Mapping[str, Any]) -> Example:
        """Join the premise to each choice by ``so`` or ``because``."""
        words = {"effect": "so", "cause": "because"}
        if row["question"] not in words:
            raise ValueError(f"question {row['question']!r} is neither 'effect' nor 'cause'")
        premise = row["premise"].rstrip().removesuffix(".")
        choices = (row["choice1"], row["choice2"])
        return Example(
            f"{premise} {words[row['question']]}",
            tuple(f" {_continue_sentence(choice)}" for choice in choices),
            class_index(row.get(self.target), len(choices)),
        )


class ReCoRD(Task):
    """Cloze questions on news (SuperGLUE): which entity fills the gap? Any of the row's answers counts as right."""

    hub = ("aps/super_glue", "record")
    objective = "gold"
    target = "answers"

    def example(self, row: Mapping[str, Any]) -> Example:
        """Score the whole query, with each entity in the gap, after the passage and its highlights."""
        entities, answers = tuple(row["entities"]), tuple(row.get(self.target) or ())
        unknown = [answer for answer in answers if answer not in entities]
        if unknown:
            raise ValueError(f"answer {unknown[0]!r} is none of the {len(entities)} entities")
        return Example(
            row["passage"].replace("@highlight\n", "- ") + "\n-",
            tuple(f" {row['query'].replace('@placeholder', entity)}" for entity in entities),
            entities.index(answers[0]) if answers else None,
            labels=tuple(index for index, entity in enumerate(entities) if entity in answers),
        )


def _continue_sentence(choice: str) -> str:
    """Lower-case the first word, unless it is ``I``."""
    first, space, rest = choice.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest

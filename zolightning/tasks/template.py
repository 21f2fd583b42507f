"""A user's own data, described in YAML alone."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any

from .base import Example, Metric, Row, Task, class_index


class TemplateTask(Task):
    """A task made of a prompt template, for your own rows: nothing to program.

    Give ``candidates`` to choose between fixed continuations, or ``answer`` to learn free text. Braces name columns;
    a literal brace is doubled.

    Args:
        prompt: Text before the continuation, with columns in braces: ``"{text} It was"``.
        candidates: Continuations to choose from, in the order of the label numbers: ``[" terrible", " great"]``.
            They follow the prompt as they stand, so most begin with a space.
        label: Column with the right candidate: its number from 0, or its text.
        answer: Column with the answer (a text, or a list of accepted texts, the training target first), or a template
            such as ``"{city}, {country}"``. A space goes before it and a newline, at which generation stops, after it.
        metric: ``accuracy`` for candidates (the default there); ``f1`` (of tokens; the default) or ``exact_match`` for
            answers.

    Raises:
        ValueError: If the description is contradictory: both or neither of ``candidates`` and ``answer``, fewer than
            two or duplicate candidates, a metric of the other kind, or a template that cannot be read.

    Example:
        >>> task = TemplateTask(prompt="{text} It was", candidates=[" terrible", " great"])
        >>> task.example({"text": "A fine film.", "label": "great"}).label
        1
    """

    def __init__(
        self,
        prompt: str,
        candidates: list[str] | None = None,
        label: str = "label",
        answer: str | None = None,
        metric: Metric | None = None,
    ) -> None:
        if (candidates is None) == (answer is None):
            raise ValueError("TemplateTask needs either candidates or answer")
        if not _columns("prompt", prompt):
            raise ValueError(f"prompt {prompt!r} names no column: write one in braces, as in '{{text}}'")
        self.prompt = prompt
        self.candidates = tuple(candidates or ())
        self.names = tuple(candidate.strip() for candidate in self.candidates)
        if candidates is not None:
            self.objective, self.target = "candidates", label
            if len(self.names) < 2:
                raise ValueError(f"candidates {candidates!r}: give at least two")
            for name in self.names:
                if self.names.count(name) > 1:
                    raise ValueError(f"candidate {name!r} is given more than once")
        else:
            columns = _columns("answer", str(answer))
            self.objective, self.target = "answer", columns[0] if columns else str(answer)
            self.answer = str(answer) if columns else None
        allowed: tuple[Metric, ...] = ("accuracy",) if candidates is not None else ("f1", "exact_match")
        self.metric = metric or allowed[0]
        if self.metric not in allowed:
            kind = "candidates" if candidates is not None else "an answer"
            raise ValueError(f"metric {metric!r} does not fit {kind}: use {' or '.join(allowed)}")

    def example(self, row: Mapping[str, Any]) -> Example:
        """Fill the templates with one row.

        Raises:
            ValueError: If a column is missing or empty, or the label names no candidate.
        """
        prompt = _fill(self.prompt, row)
        if self.candidates:
            return Example(prompt, self.candidates, self._label(row.get(self.target)))
        return Example(prompt, (), None, answers=self._answers(row))

    def _label(self, value: Any) -> int | None:
        if isinstance(value, str) and value.strip() in self.names:
            return self.names.index(value.strip())
        try:
            return class_index(value, len(self.names))
        except ValueError as error:
            named = f"label {value!r} in column {self.target!r} is none of: {', '.join(self.names)}"
            raise ValueError(named if isinstance(value, str) else str(error)) from None

    def _answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        value = row.get(self.target)
        if value is None:
            return ()
        if self.answer is not None:
            return (_fill(self.answer, row),)
        return tuple(str(answer) for answer in (value if isinstance(value, list) else [value]))


def _columns(what: str, template: str) -> list[str]:
    """The columns that a template names, in order."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"{what} {template!r} cannot be read: {error}") from None
    for field in fields:
        if not field or field.isdigit() or "." in field or "[" in field:
            raise ValueError(f"{what} {template!r}: '{{{field}}}' is not a column name; double a literal brace")
    return fields


def _fill(template: str, row: Mapping[str, Any]) -> str:
    cells = Row(row)
    for column in _columns("template", template):
        _ = cells[column]  # missing and empty ones are refused
    return template.format_map(cells)

"""From text to batches of tokens, the way MeZO and its successors do it.

``tok(prompt + continuation)`` is one sequence; the continuation is its last ``len(tok(prompt + continuation)) -
len(tok(prompt))`` tokens. Where every candidate is one token after an unchanged prompt, one forward of the prompt
scores them all; both forms give the same scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zolightning.objectives.generate import pad_token

from .base import Example, Task

WIDTH_MULTIPLE = 8  # few distinct widths: few compiled shapes, and the alignment that tensor cores like


class Tokenizer(Protocol):
    """What is used of a ``transformers`` tokenizer."""

    pad_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], *, verbose: bool = ...) -> Mapping[str, Any]:
        """Token ids of each text, with the tokenizer's own special tokens, under ``input_ids``."""
        ...


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Args:
        index: Number of the row in its split.
        label: Index of the right candidate; -1 if there is none.
        sequences: Prompt and continuation, one int64 tensor ``[T_k]`` for each sequence to score.
        scored: Number of tokens at the end of each sequence that are the continuation.
        choices: Candidate that each sequence stands for.
        correct: Whether that candidate is right.
        prompt: Prompt to generate from, int64 ``[T]``; None where nothing is generated.
        one_token: Whether each continuation is one token after the same tokens, so that one forward scores them all.
    """

    index: int
    label: int
    sequences: tuple[Tensor, ...]
    scored: tuple[int, ...]
    choices: tuple[int, ...]
    correct: tuple[bool, ...]
    prompt: Tensor | None
    one_token: bool


def encode(tokenizer: Tokenizer, prompt: str, continuation: str, max_length: int) -> tuple[list[int], int]:
    """Tokenise a prompt with one continuation.

    Args:
        tokenizer: A ``transformers`` tokenizer; its default special tokens are kept.
        prompt: Text before the continuation; spaces at its ends do not count.
        continuation: Text to score.
        max_length: Most tokens to keep: the first one and the last ``max_length - 1``.

    Returns:
        Token ids, and how many at their end are the continuation.

    Raises:
        ValueError: If the continuation adds no token, or does not fit after at least one prompt token.

    Example:
        >>> ids, scored = encode(tokenizer, "a fine film . It was", " great", max_length=2048)
        >>> tokenizer.decode(ids[-scored:])
        ' great'
    """
    prompt_ids, ids = _tokenize(tokenizer, [prompt.strip(" "), _join(prompt, continuation)])
    return _shorten(ids, max_length), _count_scored(prompt_ids, ids, continuation, max_length)


def encode_example(tokenizer: Tokenizer, task: Task, example: Example, *, index: int, max_length: int, training: bool) -> Encoded:
    """Tokenise what a task scores of one example.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        task: Says what is scored: every candidate, the right one (``gold`` in training) or the answer.
        example: The text.
        index: Number of the row in its split.
        max_length: Most tokens of a sequence; a prompt to generate from leaves room for ``task.max_new_tokens``.
        training: Whether the example is trained on, so that only what the loss needs is encoded.

    Raises:
        ValueError: As :func:`encode`; also if two classes have the same tokens.
    """
    parts = _parts(task, example, training)
    texts = dict.fromkeys(text for _, prompt, tail in parts for text in (prompt.strip(" "), _join(prompt, tail)))
    ids = dict(zip(texts, _tokenize(tokenizer, list(texts)), strict=True))
    prompts = [ids[prompt.strip(" ")] for _, prompt, _ in parts]
    fulls = [ids[_join(prompt, tail)] for _, prompt, tail in parts]
    if task.objective == "candidates":
        _check_distinct(fulls, example.candidates)
    right = example.labels or (example.label,)
    return Encoded(
        index=index,
        label=-1 if example.label is None else example.label,
        sequences=tuple(torch.tensor(_shorten(full, max_length)) for full in fulls),
        scored=tuple(
            _count_scored(prompt, full, tail, max_length) for prompt, full, (_, _, tail) in zip(prompts, fulls, parts, strict=True)
        ),
        choices=tuple(choice for choice, _, _ in parts),
        correct=tuple(task.objective == "answer" or choice in right for choice, _, _ in parts),
        prompt=None if task.objective != "answer" else _generation_prompt(tokenizer, task, example, max_length),
        one_token=all(full[:-1] == prompts[0] for full in fulls),
    )


class Collator:
    """Pads encoded examples on the left into one batch.

    The batch always holds (int64; B examples, R sequences, T a multiple of 8):

    * ``input_ids`` and ``attention_mask`` ``[R, T]``; ``label`` ``[B]``, -1 where there is none; ``index`` ``[B]``, the
      number of the row in its split.

    With ``one_forward`` R = B, the input is the prompt alone, and

    * ``candidates`` ``[B, K]`` is the token of each candidate, to be scored after the last position.

    Otherwise

    * ``scored`` ``[R]``: number of tokens at the end of the sequence to score; ``example`` ``[R]``: its example, from 0
      to B - 1; ``choice`` ``[R]``: its candidate; ``correct`` ``[R]``: 1 where that candidate is right;
    * ``max_scored`` and ``num_choices``, plain integers that save a look at the device: the largest ``scored``, and one more
      than the largest ``choice``;
    * ``prompt_ids`` and ``prompt_mask`` ``[B, T']``, only where text is generated.

    Args:
        tokenizer: Names the padding token: its own, else the end of text, else 0.
        one_forward: Whether one forward of the prompt scores all candidates; every example must be ``one_token``.

    Example:
        >>> batch = Collator(tokenizer, one_forward=True)(encoded[:16])
        >>> batch["input_ids"].shape, batch["candidates"].shape
        (torch.Size([16, 48]), torch.Size([16, 2]))
    """

    def __init__(self, tokenizer: Tokenizer, *, one_forward: bool) -> None:
        self.pad_id = pad_token(tokenizer)
        self.one_forward = one_forward

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """Pad and stack examples."""
        batch: dict[str, Any] = {
            "label": torch.tensor([example.label for example in examples]),
            "index": torch.tensor([example.index for example in examples]),
        }
        if self.one_forward:
            batch["input_ids"], batch["attention_mask"] = self._pad([example.sequences[0][:-1] for example in examples])
            batch["candidates"] = torch.stack([torch.stack([ids[-1] for ids in e.sequences]) for e in examples])
            return batch
        batch["input_ids"], batch["attention_mask"] = self._pad([ids for e in examples for ids in e.sequences])
        columns: dict[str, list[int]] = {
            "scored": [count for e in examples for count in e.scored],
            "example": [number for number, e in enumerate(examples) for _ in e.sequences],
            "choice": [choice for e in examples for choice in e.choices],
            "correct": [right for e in examples for right in e.correct],
        }
        batch.update({name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()})
        batch["max_scored"] = max(columns["scored"], default=0)
        batch["num_choices"] = max(columns["choice"], default=0) + 1
        prompts = [example.prompt for example in examples if example.prompt is not None]
        if prompts:
            batch["prompt_ids"], batch["prompt_mask"] = self._pad(prompts)
        return batch

    def _pad(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        longest = max((len(row) for row in rows), default=0)
        width = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = row
            mask[number, width - len(row) :] = 1
        return ids, mask


def _tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    # verbose=False: a text over the model's length is cut below, so a warning would be wrong
    return list(tokenizer(texts, verbose=False)["input_ids"]) if texts else []


def _join(prompt: str, continuation: str) -> str:
    return (prompt + continuation).strip(" ")


def _shorten(ids: list[int], max_length: int) -> list[int]:
    """Keep the first token (often the mark of the beginning) and cut the rest from the left."""
    return ids if len(ids) <= max_length else ids[:1] + ids[len(ids) - max_length + 1 :]


def _count_scored(prompt_ids: list[int], ids: list[int], continuation: str, max_length: int) -> int:
    scored = len(ids) - len(prompt_ids)
    if scored < 1:
        raise ValueError(f"continuation {continuation!r} adds no token to the prompt")
    if scored >= min(len(ids), max_length):
        raise ValueError(
            f"{scored} tokens to score need a prompt token before them: the prompt has {len(prompt_ids)} and max_length is {max_length}"
        )
    return scored


def _parts(task: Task, example: Example, training: bool) -> list[tuple[int, str, str]]:
    """Candidate number, prompt and continuation of each sequence to score."""
    if task.objective == "answer":
        return [(0, example.prompt, f" {answer}\n") for answer in example.answers[:1]]
    prompts = example.prompts or (example.prompt,) * len(example.candidates)
    parts = list(zip(range(len(prompts)), prompts, example.candidates, strict=True))
    if training and task.objective == "gold" and example.label is not None:
        return [parts[example.label]]
    return parts


def _check_distinct(sequences: list[list[int]], candidates: Sequence[str]) -> None:
    for number, ids in enumerate(sequences):
        if ids in sequences[:number]:
            other = candidates[sequences.index(ids)]
            raise ValueError(f"candidates {other!r} and {candidates[number]!r} have the same tokens")


def _generation_prompt(tokenizer: Tokenizer, task: Task, example: Example, max_length: int) -> Tensor:
    room = max_length - task.max_new_tokens
    if room < 1:
        raise ValueError(f"max_length {max_length} leaves no room for a prompt and {task.max_new_tokens} new tokens")
    (ids,) = _tokenize(tokenizer, [example.prompt.strip(" ")])
    return torch.tensor(_shorten(ids, room))

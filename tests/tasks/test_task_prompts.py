"""Every task's prompt against text written by hand from the published templates."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from zolightning.tasks import TASKS, Example, get_task
from zolightning.tasks.base import Row

CASES: list[tuple[str, dict[str, Any], Example]] = [
    (
        "sst2",
        {"sentence": "it 's a charming journey . ", "label": 1, "idx": 0},
        Example("it 's a charming journey . It was", (" terrible", " great"), 1),
    ),
    (
        "rotten_tomatoes",
        {"text": " a dull film . ", "label": 0},
        Example("a dull film . It was", (" terrible", " great"), 0),
    ),
    (
        "cb",
        {"premise": "It is so. I think.", "hypothesis": "it is so", "label": 2},
        Example('Suppose It is so. I think. Can we infer that "it is so"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe"), 2),
    ),
    (
        "rte",
        {"premise": "Dana died at 44.", "hypothesis": "Dana is alive.", "label": 1},
        Example('Dana died at 44.\nDoes this mean that "Dana is alive." is true? Yes or No?\n', ("Yes", "No"), 1),
    ),
    (
        "boolq",
        {"passage": "Water is wet.", "question": "is water wet", "answer": True},
        Example("Water is wet. Is water wet?\n", ("Yes", "No"), 0),
    ),
    (
        "boolq",
        {"passage": "Water is wet.", "question": "is water dry?", "answer": False},
        Example("Water is wet. Is water dry?\n", ("Yes", "No"), 1),
    ),
    (
        "wsc",
        {"text": "Bernard lost. He wept.", "span1_text": "Bernard", "span2_text": "He", "label": 1},
        Example(
            'Bernard lost. He wept.\nIn the previous sentence, does the pronoun "he" refer to Bernard? Yes or No?\n',
            ("No", "Yes"),
            1,
        ),
    ),
    (
        "wic",
        {"word": "class", "sentence1": "A new class.", "sentence2": "She has class.", "label": 0},
        Example(
            'Does the word "class" have the same meaning in these two sentences? Yes, No?\nA new class.\nShe has class.\n',
            ("No", "Yes"),
            0,
        ),
    ),
    (
        "multirc",
        {"paragraph": "Force moves things. ", "question": "What moves?", "answer": "Things", "label": 1},
        Example(
            'Force moves things. \nQuestion: What moves?\nI found this answer "Things". Is that correct? Yes or No?\n',
            ("No", "Yes"),
            1,
        ),
    ),
    (
        "copa",
        {
            "premise": "The man turned on the faucet.",
            "choice1": "The toilet filled.",
            "choice2": "I saw Water.",
            "question": "effect",
            "label": 1,
        },
        Example("The man turned on the faucet so", (" the toilet filled.", " I saw Water."), 1),
    ),
    (
        "copa",
        {
            "premise": "She fell! ",
            "choice1": "Ice lay there.",
            "choice2": "It rained.",
            "question": "cause",
            "label": 0,
        },
        Example("She fell! because", (" ice lay there.", " it rained."), 0),
    ),
    (
        "record",
        {
            "passage": "Ann met Bob.\n@highlight\nAnn is 46\n@highlight\nBob left",
            "query": "Then @placeholder went home.",
            "entities": ["Ann", "Bob", "Bobby"],
            "answers": ["Bob", "Bobby"],
        },
        Example(
            "Ann met Bob.\n- Ann is 46\n- Bob left\n-",
            (" Then Ann went home.", " Then Bob went home.", " Then Bobby went home."),
            1,
            labels=(1, 2),
        ),
    ),
    (
        "squad",
        {
            "title": "Super_Bowl_50",
            "context": "Denver won.",
            "question": " Who won? ",
            "answers": {"text": ["Denver", "the Broncos"], "answer_start": [0, 0]},
        },
        Example(
            "Title: Super_Bowl_50\nContext: Denver won.\nQuestion: Who won?\nAnswer:",
            (),
            None,
            answers=("Denver", "the Broncos"),
        ),
    ),
    (
        "drop",
        {"passage": "Two and three.", "question": "How many? ", "answers_spans": {"spans": ["5"], "types": ["number"]}},
        Example("Passage: Two and three.\nQuestion: How many?\nAnswer:", (), None, answers=("5",)),
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_prompt(name: str, row: dict[str, Any], expected: Example) -> None:
    assert get_task(name).example(row) == expected


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_rows_without_a_label(name: str, row: dict[str, Any], expected: Example) -> None:
    task = get_task(name)
    example = task.example({column: value for column, value in row.items() if column != task.target})
    assert (example.prompt, example.candidates) == (expected.prompt, expected.candidates)
    assert not example.is_labelled
    assert expected.is_labelled


REAL = [name for name in TASKS if name != "demo"]  # its rows come with the package: tests/test_demo.py


def test_every_task_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == set(REAL)


@pytest.mark.parametrize("name", REAL)
def test_real_rows(name: str, shared: Path) -> None:
    import gzip

    task = get_task(name)
    for split in ("train", "validation"):
        file = next((shared / name).glob(f"{split}.jsonl*"))
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            examples = [task.example(Row(json.loads(line))) for line, _ in zip(lines, range(300), strict=False)]
        assert all(example.is_labelled for example in examples)
        assert all(example.prompt.strip() for example in examples)


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'sst3'; known: sst2, rte, cb, .*rotten_tomatoes, demo$"):
        get_task("sst3")


def test_a_task_is_returned_as_it_is() -> None:
    task = get_task("rte")
    assert get_task(task) is task


@pytest.mark.parametrize("label", [2, -2, "one", "2", 0.5, math.inf, [1]])
def test_label_out_of_range(label: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"label {label!r} is not a number from 0 to 1")):
        get_task("sst2").example({"sentence": "x", "label": label})


@pytest.mark.parametrize("label", [None, "", math.nan, -1, -1.0, "-1"])
def test_no_label(label: Any) -> None:
    assert get_task("sst2").example({"sentence": "x", "label": label}).label is None


@pytest.mark.parametrize("label", [1, True, 1.0, "1", "1.0", " 1 "])
def test_label_as_files_hold_it(label: Any) -> None:
    assert get_task("sst2").example({"sentence": "x", "label": label}).label == 1


def test_copa_question() -> None:
    with pytest.raises(ValueError, match="question 'why' is neither 'effect' nor 'cause'"):
        get_task("copa").example({"premise": "x", "choice1": "a", "choice2": "b", "question": "why"})


def test_record_answer() -> None:
    with pytest.raises(ValueError, match="answer 'Eve' is none of the 1 entities"):
        get_task("record").example({"passage": "x", "query": "y", "entities": ["Ann"], "answers": ["Eve"]})

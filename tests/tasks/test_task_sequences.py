"""What a model is given and what of it is scored, letter by letter, for each of the eleven tasks: from the published templates, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from zolightning.tasks import TASKS, encode_example, get_task

Pair = tuple[str, str]  # the whole text; its end that is scored

CASES: list[tuple[str, dict[str, Any], list[Pair]]] = [
    (
        "sst2",
        {"sentence": " hide new secretions from the parental units ", "label": 0},
        [
            ("hide new secretions from the parental units It was terrible", " terrible"),
            ("hide new secretions from the parental units It was great", " great"),
        ],
    ),
    (
        "rte",
        {"premise": "No weapons of mass destruction found.", "hypothesis": "Weapons found.", "label": 1},
        [
            ('No weapons of mass destruction found.\nDoes this mean that "Weapons found." is true? Yes or No?\nYes', "Yes"),
            ('No weapons of mass destruction found.\nDoes this mean that "Weapons found." is true? Yes or No?\nNo', "No"),
        ],
    ),
    (
        "cb",
        {"premise": "It was a complex language.", "hypothesis": "the language was peeled down", "label": 0},
        [
            ('Suppose It was a complex language. Can we infer that "the language was peeled down"? Yes, No, or Maybe?\nYes', "Yes"),
            ('Suppose It was a complex language. Can we infer that "the language was peeled down"? Yes, No, or Maybe?\nNo', "No"),
            ('Suppose It was a complex language. Can we infer that "the language was peeled down"? Yes, No, or Maybe?\nMaybe', "Maybe"),
        ],
    ),
    (
        "boolq",
        {"passage": "Ethanol takes energy.", "question": "does ethanol take more energy", "answer": False},
        [
            ("Ethanol takes energy. Does ethanol take more energy?\nYes", "Yes"),
            ("Ethanol takes energy. Does ethanol take more energy?\nNo", "No"),
        ],
    ),
    (
        "wsc",
        {"text": "Bernard told them. He was right.", "span1_text": "Bernard", "span2_text": "He", "label": 1},
        [
            (
                "Bernard told them. He was right.\nIn the previous sentence, does the pronoun "
                '"he" refer to Bernard? Yes or No?\nNo', "No",
            ),
            (
                "Bernard told them. He was right.\nIn the previous sentence, does the pronoun "
                '"he" refer to Bernard? Yes or No?\nYes', "Yes",
            ),
        ],
    ),
    (
        "wic",
        {"word": "place", "sentence1": "Do you want to come over to my place later?", "sentence2": "A political system.", "label": 0},
        [
            (
                'Does the word "place" have the same meaning in these two sentences? Yes, No?\n'
                "Do you want to come over to my place later?\nA political system.\nNo", "No",
            ),
            (
                'Does the word "place" have the same meaning in these two sentences? Yes, No?\n'
                "Do you want to come over to my place later?\nA political system.\nYes", "Yes",
            ),
        ],
    ),
    (
        "multirc",
        {"paragraph": "An old tale.", "question": "Who was it?", "answer": "Bin Laden", "label": 1},
        [
            (
                'An old tale.\nQuestion: Who was it?\nI found this answer "Bin Laden". Is that correct? Yes or No?\nNo', "No",
            ),
            (
                'An old tale.\nQuestion: Who was it?\nI found this answer "Bin Laden". Is that correct? Yes or No?\nYes', "Yes",
            ),
        ],
    ),
    (
        "copa",
        {"premise": "The man broke his toe.", "choice1": "He got a hole.", "choice2": "I Dropped it.", "question": "cause", "label": 1},
        [
            ("The man broke his toe because he got a hole.", " he got a hole."),
            ("The man broke his toe because I Dropped it.", " I Dropped it."),
        ],
    ),
    (
        "record",
        {
            "passage": "The harrowing stories.\n@highlight\nPuerto Rico is hit\n@highlight\nUS slow",
            "query": "On @placeholder, help is late", "entities": ["Puerto Rico", "US"], "answers": ["Puerto Rico"],
        },
        [
            ("The harrowing stories.\n- Puerto Rico is hit\n- US slow\n- On Puerto Rico, help is late", " On Puerto Rico, help is late"),
            ("The harrowing stories.\n- Puerto Rico is hit\n- US slow\n- On US, help is late", " On US, help is late"),
        ],
    ),
    (
        "squad",
        {"title": "Notre_Dame", "context": "A statue.", "question": " What is it? ", "answers": {"text": ["a statue", "statue"]}},
        [("Title: Notre_Dame\nContext: A statue.\nQuestion: What is it?\nAnswer: a statue\n", " a statue\n")],
    ),
    (
        "drop",
        {"passage": "The Bears kicked 2 goals.", "question": "How many goals? ", "answers_spans": {"spans": ["2", "two"]}},
        [("Passage: The Bears kicked 2 goals.\nQuestion: How many goals?\nAnswer: 2\n", " 2\n")],
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def exact(tiny_folder: str) -> Any:
    """A byte-level tokenizer without special tokens: decoding gives back the text to the letter."""
    return AutoTokenizer.from_pretrained(tiny_folder)


def sequences(tokenizer: Any, name: str, row: dict[str, Any], training: bool = False) -> list[Pair]:
    """Each sequence and its scored end as text."""
    task = get_task(name)
    encoded = encode_example(tokenizer, task, task.example(row), index=0, max_length=512, training=training)
    return [(tokenizer.decode(ids), tokenizer.decode(ids[-n:])) for ids, n in zip(encoded.sequences, encoded.scored, strict=True)]


@pytest.mark.parametrize(("name", "row", "expected"), CASES, ids=[case[0] for case in CASES])
def test_sequences(name: str, row: dict[str, Any], expected: list[Pair], exact: Any) -> None:
    assert sequences(exact, name, row) == expected


@pytest.mark.parametrize(("name", "row", "expected"), CASES, ids=[case[0] for case in CASES])
def test_what_is_trained_on(name: str, row: dict[str, Any], expected: list[Pair], exact: Any) -> None:
    """All candidates of a class task; the right choice alone for COPA (here the second) and ReCoRD (the first)."""
    right = {"copa": expected[1:], "record": expected[:1]}.get(name, expected)
    assert sequences(exact, name, row, training=True) == right


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("squad", "Title: Notre_Dame\nContext: A statue.\nQuestion: What is it?\nAnswer:"),
        ("drop", "Passage: The Bears kicked 2 goals.\nQuestion: How many goals?\nAnswer:"),
    ],
)
def test_generation_starts_after_the_colon(name: str, prompt: str, exact: Any) -> None:
    task, row = get_task(name), next(row for case, row, _ in CASES if case == name)
    encoded = encode_example(exact, task, task.example(row), index=0, max_length=512, training=False)
    assert encoded.prompt is not None
    assert exact.decode(encoded.prompt) == prompt


def test_all_eleven() -> None:
    assert {name for name, _, _ in CASES} == set(TASKS) - {"rotten_tomatoes", "demo"}

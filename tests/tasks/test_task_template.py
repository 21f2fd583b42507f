"""A user's own data: templates, labels by number and by name, and what goes wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zolightning.tasks import Example, TaskDataModule, TemplateTask

THREE = [" bad", " okay", " good"]


def test_candidates_by_number_and_by_name() -> None:
    task = TemplateTask("{text} It was", THREE, label="stars")
    assert task.example({"text": "a film", "stars": 2}) == Example("a film It was", tuple(THREE), 2)
    assert task.example({"text": "a film", "stars": "okay "}).label == 1
    assert task.example({"text": "a film"}).label is None
    assert (task.objective, task.metric, task.target) == ("candidates", "accuracy", "stars")


def test_answer_from_a_column_or_a_template() -> None:
    task = TemplateTask("{q}", answer="a")
    assert task.example({"q": "where", "a": "Rome"}) == Example("where", (), None, answers=("Rome",))
    assert task.example({"q": "where", "a": ["Rome", "Roma"]}).answers == ("Rome", "Roma")
    assert task.example({"q": "how many", "a": 5}).answers == ("5",)
    assert not task.example({"q": "where"}).is_labelled
    assert (task.objective, task.metric, task.target) == ("answer", "f1", "a")
    task = TemplateTask("{q}", answer="{city}, {country}", metric="exact_match")
    assert task.example({"q": "where", "city": "Rome", "country": "Italy"}).answers == ("Rome, Italy",)
    assert (task.metric, task.target) == ("exact_match", "city")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "{x}"}, "needs either candidates or answer"),
        ({"prompt": "{x}", "candidates": THREE, "answer": "a"}, "needs either candidates or answer"),
        ({"prompt": "x", "candidates": THREE}, "prompt 'x' names no column"),
        ({"prompt": "{x", "candidates": THREE}, "prompt '{x' cannot be read"),
        ({"prompt": "{} x", "candidates": THREE}, "'{}' is not a column name"),
        ({"prompt": "{0} x", "candidates": THREE}, "'{0}' is not a column name"),
        ({"prompt": "{x.y}", "candidates": THREE}, "'{x.y}' is not a column name"),
        ({"prompt": "{x}", "candidates": ["a"]}, "give at least two"),
        ({"prompt": "{x}", "candidates": ["a", "b", " a"]}, "candidate 'a' is given more than once"),
        ({"prompt": "{x}", "candidates": THREE, "metric": "f1"}, "metric 'f1' does not fit candidates: use accuracy"),
        ({"prompt": "{x}", "answer": "a", "metric": "accuracy"}, "metric 'accuracy' does not fit an answer: use f1 or"),
    ],
)
def test_contradictory_description(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TemplateTask(**arguments)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a"}, "column 'text' is missing; the columns are: txt"),
        ({"text": None}, "column 'text' is empty"),
        ({"text": "a", "label": 3}, "label 3 is not a number from 0 to 2"),
        ({"text": "a", "label": "fine"}, "label 'fine' in column 'label' is none of: bad, okay, good"),
    ],
)
def test_bad_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        TemplateTask("{text} It was", THREE).example(row)


def test_csv_with_three_labels(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "reviews.csv"
    names = ["bad", "okay", "good"]
    file.write_text("text,verdict\n" + "".join(f'"a film, {n}",{names[n % 3]}\n' for n in range(20)))
    task = TemplateTask("{text} It was", THREE, label="verdict")
    data = TaskDataModule(task, train_file=str(file), tokenizer=tokenizer, batch_size=4)
    data.setup("fit")
    assert (len(data.train_examples), len(data.validation_examples)) == (16, 4)
    assert data.num_candidates == 3
    batch = data.train_batch(0)
    assert batch["candidates"].shape == (4, 3)
    for label, index in zip(batch["label"].tolist(), batch["index"].tolist(), strict=True):
        example = data.train_examples[index]
        assert example.label == label == int(example.prompt.removeprefix("a film, ").split()[0]) % 3


def test_csv_keeps_words_that_look_missing(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text("text,label\n" + "NA,None\nnull,great\n" * 5)
    task = TemplateTask("{text}", [" None", " great"])
    data = TaskDataModule(task, train_file=str(file), tokenizer=tokenizer)
    data.setup("fit")
    assert {(example.prompt, example.label) for example in data.train_examples} == {("NA", 0), ("null", 1)}


def test_missing_column_names_file_and_row(write: Callable[..., str], tokenizer: Any) -> None:
    file = write("mine.jsonl", [{"text": "a film", "lable": 1}] * 10)
    data = TaskDataModule(TemplateTask("{text} It was", THREE), train_file=file, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"mine.jsonl, row \d: column 'label' is missing; the columns are: text, lable$"):
        data.setup("fit")

"""Files to batches: formats, choice of rows, forms, loaders, errors."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zolightning.tasks import TaskDataModule, TemplateTask
from zolightning.tasks.loading import load_file, load_hub

Write = Callable[..., str]


def reviews(count: int, labelled: bool = True) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"sentence": f"film {n}", "label": n % 2} for n in range(count)]
    return rows if labelled else [{"sentence": row["sentence"]} for row in rows]


def numbers(examples: list[Any]) -> list[int]:
    return [int(example.prompt.split()[1]) for example in examples]


def test_formats(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": "a\tb", "label": 0}, {"text": "c", "label": 1}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("text,label\na\tb,0\nc,1\n")
    (tmp_path / "a.tsv").write_text('text\tlabel\n"a\tb"\t0\nc\t1\n')
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz"):
        assert load_file(str(tmp_path / name)).to_list() == rows, name


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data file nowhere.jsonl does not exist"):
        load_file("nowhere.jsonl")
    for name, content, message in [
        ("a.txt", "x", "a.txt: unknown ending; known: .jsonl, .json, .csv, .tsv, .parquet"),
        ("a.jsonl", "", "a.jsonl has no rows or cannot be read: "),
        ("a.csv", "text,label\n", "a.csv has no rows or cannot be read: "),
        ("b.jsonl", "{broken\n", "b.jsonl has no rows or cannot be read: "),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"^data file [^\n]*{re.escape(message)}[^\n]*$"):
            load_file(str(tmp_path / name))


def test_hold_out_is_the_reference_choice(write: Write, tokenizer: Any) -> None:
    data = TaskDataModule(train_file=write("train.jsonl", reviews(50)), tokenizer=tokenizer, num_train=20, seed=43)
    data.setup("fit")
    order = np.random.RandomState(43).permutation(50).tolist()  # the stream of the published np.random.seed(43)
    assert numbers(data.train_examples) == order[:20]
    assert numbers(data.validation_examples) == order[20:30]
    assert data.train_labels == [number % 2 for number in order[:20]]


def test_hold_out_is_at_most_num_validation(write: Write, tokenizer: Any) -> None:
    file = write("train.jsonl", reviews(50))
    data = TaskDataModule(train_file=file, tokenizer=tokenizer, num_train=None, num_validation=4)
    data.setup("fit")
    assert (len(data.train_examples), len(data.validation_examples)) == (46, 4)
    assert sorted(numbers(data.train_examples) + numbers(data.validation_examples)) == list(range(50))


def test_validation_file(write: Write, tokenizer: Any) -> None:
    files: dict[str, Any] = {
        "train_file": write("train.jsonl", reviews(20)),
        "validation_file": write("val.jsonl", reviews(30)),
    }
    data = TaskDataModule(**files, tokenizer=tokenizer, num_validation=12)
    data.setup("fit")
    assert numbers(data.validation_examples) == np.random.RandomState(0).permutation(30)[:12].tolist()
    assert sorted(numbers(data.train_examples)) == list(range(20))
    every = TaskDataModule(**files, tokenizer=tokenizer, num_validation=None)
    every.setup("validate")
    assert len(every.validation_examples) == 30
    assert every.train_examples


def test_loaders(write: Write, tokenizer: Any) -> None:
    data = TaskDataModule(
        train_file=write("train.jsonl", reviews(100)),
        tokenizer=tokenizer,
        batch_size=8,
        eval_batch_size=16,
        calibration_rows=24,
    )
    data.setup("fit")
    assert data.one_forward
    assert (data.objective, data.metric, data.num_candidates) == ("candidates", "accuracy", 2)
    train = list(data.train_dataloader())
    assert len(train) == 10
    for t, batch in enumerate(train):
        assert all(torch.equal(value, data.train_batch(t)[key]) for key, value in batch.items())
    validation, calibration = data.val_dataloader()
    assert [batch["index"].tolist() for batch in validation] == [list(range(16)), list(range(16, 20))]
    assert [batch["index"].tolist() for batch in calibration] == [list(range(16)), list(range(16, 24))]
    labels = torch.cat([batch["label"] for batch in calibration]).tolist()
    assert labels == data.train_labels[:24]


def test_no_calibration_rows(write: Write, tokenizer: Any) -> None:
    file = write("train.jsonl", reviews(20))
    data = TaskDataModule(train_file=file, tokenizer=tokenizer, calibration_rows=0)
    data.setup("fit")
    assert len(data.val_dataloader()) == 1


def test_one_long_candidate_anywhere_makes_every_loader_use_sequences(write: Write, tokenizer: Any) -> None:
    # "x" + "It" is one token with the prompt in one validation row only, so the prompt is not a prefix there
    task = TemplateTask("{text}", ["great x", "fine y"])
    train = write("train.jsonl", [{"text": "a\n", "label": n % 2} for n in range(10)])
    validation = write("val.jsonl", [{"text": "a\n", "label": 0}, {"text": "a", "label": 1}])
    data = TaskDataModule(task, train_file=train, validation_file=validation, tokenizer=tokenizer, batch_size=4)
    data.setup("fit")
    assert not data.one_forward
    assert "scored" in data.train_batch(0)
    assert all("scored" in next(iter(loader)) for loader in data.val_dataloader())


def test_gold_task(write: Write, tokenizer: Any) -> None:
    row = {"premise": "x.", "choice1": "One", "choice2": "Two y", "question": "cause"}
    file = write("train.jsonl", [{**row, "label": n % 2} for n in range(20)])
    data = TaskDataModule("copa", train_file=file, tokenizer=tokenizer, batch_size=4)
    data.setup("fit")
    batch = data.train_batch(0)
    assert batch["input_ids"].shape[0] == 4
    assert batch["choice"].tolist() == batch["label"].tolist()
    (loader,) = data.val_dataloader()
    assert next(iter(loader))["choice"].tolist() == [0, 1] * 4


def test_answer_task(write: Write, tokenizer: Any) -> None:
    row = {"passage": "x", "question": "y", "answers_spans": {"spans": ["one", "two"], "types": ["span", "span"]}}
    data = TaskDataModule("drop", train_file=write("train.jsonl", [row] * 20), tokenizer=tokenizer, batch_size=4)
    data.setup("fit")
    assert (data.objective, data.metric, data.num_candidates) == ("answer", "f1", 0)
    assert data.train_labels == [-1] * 16
    assert data.train_batch(0)["prompt_ids"].shape[0] == 4, "a reward generates in training too"
    (loader,) = data.val_dataloader()
    batch = next(iter(loader))
    assert batch["prompt_ids"].shape[0] == batch["input_ids"].shape[0] == 4
    assert data.validation_examples[0].answers == ("one", "two")


def test_test_and_predict(write: Write, tokenizer: Any) -> None:
    train = write("train.jsonl", reviews(20))
    data = TaskDataModule(train_file=train, test_file=write("test.jsonl", reviews(7, labelled=False)), tokenizer=tokenizer)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["label"].tolist() == [-1] * 7
    assert numbers(data.test_examples) == batch["index"].tolist() == list(range(7))
    with pytest.raises(ValueError, match=r"test.jsonl, row 0: column 'label' is missing; the columns are: sentence$"):
        data.setup("test")


def test_test_without_a_test_file_is_validation(write: Write, tokenizer: Any) -> None:
    data = TaskDataModule(train_file=write("train.jsonl", reviews(20)), tokenizer=tokenizer)
    data.setup("test")
    test, calibration = data.test_dataloader()
    assert [sum(len(batch["index"]) for batch in loader) for loader in (test, calibration)] == [4, 16]
    assert data.test_examples == data.validation_examples


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_of_one_file_needs_no_training_rows(stage: str, write: Write, tokenizer: Any) -> None:
    data = TaskDataModule(validation_file=write("val.jsonl", reviews(6)), tokenizer=tokenizer)
    data.setup(stage)
    loaders = {"validate": data.val_dataloader, "test": data.test_dataloader}
    loader = data.predict_dataloader() if stage == "predict" else loaders[stage]()[0]
    assert next(iter(loader))["index"].tolist() == list(range(6))


def test_predict_on_unlabelled_validation_rows(write: Write, tokenizer: Any) -> None:
    data = TaskDataModule(validation_file=write("val.jsonl", reviews(6, labelled=False)), tokenizer=tokenizer)
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["label"].tolist() == [-1] * 6


def test_training_rows_stay_after_testing(write: Write, tokenizer: Any) -> None:
    test = write("test.jsonl", reviews(5))
    data = TaskDataModule(train_file=write("train.jsonl", reviews(20)), test_file=test, tokenizer=tokenizer)
    data.setup("fit")
    before = data.train_examples
    data.setup("test")
    assert data.train_examples == before
    assert len(data.test_examples) == 5


def test_hub(tmp_path: Path, write: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    splits = {"train": datasets.Dataset.from_list(reviews(20))}

    def load(path: str, config: str | None) -> dict[str, Any]:
        asked.append((path, config))
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = TaskDataModule("sst2", tokenizer=tokenizer)
    data.setup("fit")
    assert (len(data.train_examples), len(data.validation_examples)) == (16, 4)
    splits["validation"] = datasets.Dataset.from_list(reviews(9))
    TaskDataModule("sst2", hub="mine/sst:small", tokenizer=tokenizer).setup("fit")
    data = TaskDataModule("sst2", hub="mine/sst", tokenizer=tokenizer)
    data.setup("fit")
    assert (len(data.train_examples), len(data.validation_examples)) == (20, 9)
    assert asked == [("nyu-mll/glue", "sst2"), ("mine/sst", "small"), ("mine/sst", None)]


def test_hub_errors(write: Write, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    folder = Path(write("folder/validation.jsonl", reviews(4))).parent
    monkeypatch.setattr("datasets.load_dataset", lambda path, config: {"train": []})
    with pytest.raises(ValueError, match=r"^data set mine \(train\) has no rows$"):
        load_hub("mine", None)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"data set .*folder has no train split; it has: validation$"):
        load_hub(str(folder), None)
    with pytest.raises(ValueError, match=r"^data set ./no/such:x cannot be loaded: [^\n]+$"):
        load_hub("./no/such", "x")
    task = TemplateTask("{text}", [" terrible", " great"])
    with pytest.raises(ValueError, match="TemplateTask has no data of its own: give train_file or hub"):
        TaskDataModule(task, tokenizer=tokenizer).setup("fit")


def test_folder_as_hub(write: Write, tokenizer: Any) -> None:
    write("folder/train.jsonl", reviews(10))
    folder = Path(write("folder/validation.jsonl", reviews(4))).parent
    data = TaskDataModule(hub=str(folder), tokenizer=tokenizer)
    data.setup("fit")
    assert (len(data.train_examples), len(data.validation_examples)) == (10, 4)


def test_data_errors(write: Write, tokenizer: Any) -> None:
    few = write("few.jsonl", reviews(4))
    with pytest.raises(ValueError, match=r"few.jsonl has too few rows \(4\) to hold any out: give validation_file"):
        TaskDataModule(train_file=few, tokenizer=tokenizer).setup("fit")
    data = TaskDataModule(train_file=few, validation_file=few, tokenizer=tokenizer)
    data.setup("fit")
    with pytest.raises(ValueError, match="batch_size 16 is larger than the number of training rows, 4"):
        data.train_batch(0)
    hidden = write("hidden.jsonl", [{"sentence": "x", "label": -1}] * 5)
    with pytest.raises(ValueError, match=r"hidden.jsonl, row \d: no label in column 'label': -1"):
        TaskDataModule(train_file=hidden, tokenizer=tokenizer).setup("fit")
    with pytest.raises(ValueError, match=r"few.jsonl, row \d: 1 tokens to score need a prompt token .*max_length is 1"):
        TaskDataModule(train_file=few, validation_file=few, tokenizer=tokenizer, max_length=1).setup("fit")
    with pytest.raises(RuntimeError, match=r"there are no train rows yet: call setup\(\) first"):
        TaskDataModule(train_file=few, tokenizer=tokenizer).train_batch(0)


def test_tokenizer_by_folder(tmp_path: Path, write: Write, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    file = write("train.jsonl", reviews(20))
    named = TaskDataModule(train_file=file, tokenizer=str(tmp_path / "tok"), batch_size=4)
    given = TaskDataModule(train_file=file, tokenizer=tokenizer, batch_size=4)
    for data in (named, given):
        data.setup("fit")
    assert torch.equal(named.train_batch(3)["input_ids"], given.train_batch(3)["input_ids"])
    with pytest.raises(ValueError, match=r"^tokenizer './none' cannot be loaded: [^\n]+$"):
        TaskDataModule(train_file=file, tokenizer="./none").setup("fit")
    with pytest.raises(ValueError, match="no tokenizer: give tokenizer, or train a module that has one"):
        TaskDataModule(train_file=file).setup("fit")


def test_another_tokenizer_forgets_the_old_tokens(write: Write, make_tokenizer: Any) -> None:
    files: dict[str, Any] = {
        "train_file": write("train.jsonl", reviews(20)),
        "test_file": write("test.jsonl", reviews(5)),
    }
    data = TaskDataModule(**files, tokenizer=make_tokenizer(), batch_size=4)
    data.setup("fit")
    data.tokenizer = make_tokenizer(bos=False)
    data.setup("predict")
    with pytest.raises(RuntimeError, match="there are no train rows yet"):
        data.train_batch(0)


def test_real_data_compressed(shared: Path, tokenizer: Any) -> None:
    folder = shared / "wic"
    data = TaskDataModule(
        "wic",
        train_file=str(folder / "train.jsonl.gz"),
        validation_file=str(folder / "validation.jsonl"),
        num_train=50,
        num_validation=50,
        tokenizer=tokenizer,
    )
    with pytest.raises(ValueError, match="candidates 'No' and 'Yes' have the same tokens"):
        data.setup("fit")  # the tiny vocabulary knows neither word
    data.task = TemplateTask("{sentence1}\n", ["one", "two"])
    data.setup("fit")
    assert (len(data.train_examples), len(data.validation_examples)) == (50, 50)


def test_command_line_parses_it() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TaskDataModule, "data")
    config = {
        "class_path": "zolightning.tasks.TemplateTask",
        "init_args": {"prompt": "{text} It was", "candidates": [" terrible", " great"], "label": "label"},
    }
    parsed = parser.parse_object({"data": {"task": config, "tokenizer": "some/folder"}})
    data = parser.instantiate(parsed).data
    assert isinstance(data.task, TemplateTask)
    assert data.tokenizer == "some/folder"
    assert parser.instantiate(parser.parse_args(["--data.task=rte"])).data.task.target == "label"
    assert "Rows a training batch" in parser.format_help()

"""From a task and its files to batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zolightning.models import first_line

from .base import Example, Metric, Objective, Row, Task
from .encoding import Collator, Encoded, Tokenizer, encode_example
from .loading import load_file, load_hub
from .registry import get_task
from .steps import StepKeyedSampler

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("zolightning")

Batch = dict[str, Tensor]


class _Source(NamedTuple):
    where: str
    rows: datasets.Dataset


class _Split(NamedTuple):
    examples: list[Example]
    encoded: list[Encoded]


class TaskDataModule(lightning.LightningDataModule):
    """The rows of a task as batches of tokens.

    Training rows come from ``train_file`` or the hub; validation rows from ``validation_file`` or the hub's validation
    split, or, where there is none, from training rows that are held out (a fifth, at most ``num_validation``).
    Rows are chosen by a permutation keyed by ``seed``.

    It works without a Trainer too: ``setup("fit")``, then ``train_batch(t)``.

    Args:
        task: Short name (sst2, rte, cb, boolq, wsc, wic, multirc, copa, record, squad, drop, rotten_tomatoes, demo), or a
            task by class_path, such as zolightning.TemplateTask for your own data.
        train_file: Local training rows: .jsonl, .json, .csv, .tsv or .parquet, text also as .gz. Without it: the hub.
        validation_file: Local validation rows, in the same formats.
        test_file: Local rows for test and predict, all of them, in their order. Without it: the validation rows.
        hub: Hub id to load instead of the task's own, as ``name`` or ``name:configuration``.
        tokenizer: Folder or hub id of a tokenizer, or the tokenizer itself. Without it: the tokenizer of the module
            that is trained.
        batch_size: Rows a training batch.
        eval_batch_size: Rows an evaluation batch.
        num_train: Training rows at most; null for all.
        num_validation: Validation rows at most; null for all.
        max_length: Longest sequence in tokens; the first token and the end are kept.
        seed: Seed of the choice of rows and of their order in training.
        num_workers: Processes that load batches; 0 is enough, all rows are tokenised beforehand.
        calibration_rows: First training rows that form the second validation loader, on which candidate biases are
            refitted; 0 for none. Only tasks that compare classes have it.

    Example:
        >>> data = TaskDataModule("sst2", train_file="train.jsonl.gz", tokenizer="path/of/model")
        >>> data.setup("fit")
        >>> data.train_batch(0)["input_ids"].shape
        torch.Size([16, 48])
    """

    def __init__(
        self,
        task: str | Task = "sst2",
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        hub: str | None = None,
        tokenizer: str | Tokenizer | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        num_train: int | None = 1000,
        num_validation: int | None = 500,
        max_length: int = 2048,
        seed: int = 0,
        num_workers: int = 0,
        calibration_rows: int = 200,
    ) -> None:
        super().__init__()
        least = {"batch_size": 1, "eval_batch_size": 1, "num_train": 1, "num_validation": 1, "calibration_rows": 0}
        given = (batch_size, eval_batch_size, num_train, num_validation, calibration_rows)
        for (name, bound), value in zip(least.items(), given, strict=True):
            if value is not None and value < bound:
                raise ValueError(f"{name}={value} must be at least {bound}")
        self.task = get_task(task)
        self.train_file = train_file
        self.validation_file = validation_file
        self.test_file = test_file
        if self.task.files and not (train_file or hub):
            self.train_file, self.validation_file = self.task.files[0], validation_file or self.task.files[1]
        self.hub = hub
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_train = num_train
        self.num_validation = num_validation
        self.max_length = max_length
        self.seed = seed
        self.num_workers = num_workers
        self.calibration_rows = calibration_rows
        #: Training rows that were held out because there are no validation rows.
        self.held_out = 0
        self._splits: dict[str, _Split] = {}
        self._encoded_with: Tokenizer | None = None

    @property
    def objective(self) -> Objective:
        """How the task is trained: ``candidates``, ``gold`` or ``answer``."""
        return self.task.objective

    @property
    def metric(self) -> Metric:
        """The task's metric: ``accuracy``, ``f1`` or ``exact_match``."""
        return self.task.metric

    @property
    def num_candidates(self) -> int:
        """Candidates a row; 0 where rows differ or the answer is free."""
        counts = {len(example.candidates) for split in self._splits.values() for example in split.examples}
        return counts.pop() if len(counts) == 1 else 0

    @property
    def train_examples(self) -> list[Example]:
        """The training rows as text; a batch's ``index`` points into this list."""
        return self._split("train").examples

    @property
    def validation_examples(self) -> list[Example]:
        """The validation rows as text; a batch's ``index`` points into this list."""
        return self._split("validation").examples

    @property
    def test_examples(self) -> list[Example]:
        """The rows for test and predict as text; a batch's ``index`` points into this list."""
        return self._test_split().examples

    @property
    def train_labels(self) -> list[int]:
        """The label of each training row; -1 where the answer is free."""
        return [encoded.label for encoded in self._split("train").encoded]

    @property
    def one_forward(self) -> bool:
        """Whether one forward of the prompt scores all candidates of every row that is loaded."""
        rows = [row for split in self._splits.values() for row in split.encoded]
        return self.objective == "candidates" and self.num_candidates > 0 and all(row.one_token for row in rows)

    def setup(self, stage: str | None = None) -> None:
        """Load, choose and tokenise the rows.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None for all that training and validation need.

        Raises:
            FileNotFoundError: If a file does not exist.
            ValueError: If rows, columns or labels are missing or do not fit, or there is no tokenizer.
        """
        tokenizer = self._find_tokenizer()
        if tokenizer is not self._encoded_with:
            self._splits, self._encoded_with = {}, tokenizer
        sources = self._load(stage)
        module = self.trainer.lightning_module if self.trainer else None
        compares = bool(getattr(getattr(module, "objective", None), "compares", False))
        for name, numbers in self._choose(sources).items():
            labelled, training = name == "train" or stage != "predict", name == "train" and not compares
            self._splits[name] = self._encode(sources[name], numbers, training=training, labelled=labelled)

    def train_batch(self, t: int) -> Batch:
        """Batch ``t`` of the run on the CPU: the same that the Trainer sees at step ``t``.

        Args:
            t: Number of the batch, from 0, counted over all epochs.

        Returns:
            The batch that :class:`zolightning.tasks.Collator` describes.
        """
        rows = self._split("train").encoded
        return self._collator()([rows[number] for number in self._sampler().batch(t)])

    def train_dataloader(self) -> DataLoader[Encoded]:
        """Training batches, from the Trainer's current step on."""
        sampler = self._sampler(step=self._current_step)
        return self._loader(self._split("train").encoded, batch_sampler=sampler)

    def val_dataloader(self) -> list[DataLoader[Encoded]]:
        """The validation batches; then, for tasks that compare classes, those of the first training rows."""
        return [self._evaluation_loader(self._split("validation").encoded), *self._calibration_loaders()]

    def test_dataloader(self) -> list[DataLoader[Encoded]]:
        """The test batches (the validation rows if there is no ``test_file``); then as :meth:`val_dataloader`."""
        return [self._evaluation_loader(self._test_split().encoded), *self._calibration_loaders()]

    def predict_dataloader(self) -> DataLoader[Encoded]:
        """The batches of ``test_file``, or of the validation rows; they need no labels."""
        return self._evaluation_loader(self._test_split().encoded)

    def state_dict(self) -> dict[str, Any]:
        """What decides which rows a step sees."""
        return {name: getattr(self, name) for name in ("batch_size", "num_train", "seed")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say so where a run goes on with other rows."""
        resumes = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        for name, value in state_dict.items() if resumes else ():
            if getattr(self, name) != value:
                log.warning("data.%s=%s instead of the checkpoint's %s: the coming steps see other rows", name, getattr(self, name), value)

    def _find_tokenizer(self) -> Tokenizer:
        if isinstance(self.tokenizer, str):
            from transformers import AutoTokenizer

            try:
                self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
            except (OSError, ValueError) as error:
                raise ValueError(f"tokenizer {self.tokenizer!r} cannot be loaded: {first_line(error)}") from error
        module = self.trainer.lightning_module if self.trainer else None
        tokenizer = getattr(module, "tokenizer", None) if self.tokenizer is None else self.tokenizer
        if tokenizer is None:
            raise ValueError("no tokenizer: give tokenizer, or train a module that has one")
        return cast("Tokenizer", tokenizer)

    def _load(self, stage: str | None) -> dict[str, _Source]:
        """The rows that a stage needs; validation rows to be held out are the training source itself."""
        uses_test_file = bool(self.test_file) and stage in ("test", "predict")
        sources: dict[str, _Source] = {}
        needs_train = stage in ("fit", None) or not (self.validation_file or uses_test_file)
        if needs_train or (self.train_file and stage != "predict"):
            if self.train_file:
                sources["train"] = sources["validation"] = _Source(self.train_file, load_file(self.train_file))
            else:
                sources = self._load_hub()
        if self.validation_file:
            sources["validation"] = _Source(self.validation_file, load_file(self.validation_file))
        if self.test_file and uses_test_file:
            sources["test"] = _Source(self.test_file, load_file(self.test_file))
        return sources

    def _load_hub(self) -> dict[str, _Source]:
        if self.hub:
            path, _, config = self.hub.partition(":")
        elif self.task.hub:
            path, config = self.task.hub[0], self.task.hub[1] or ""
        else:
            raise ValueError(f"{type(self.task).__name__} has no data of its own: give train_file or hub")
        splits = load_hub(path, config or None)
        train = _Source(f"{path} (train)", splits["train"])
        if "validation" not in splits:
            return {"train": train, "validation": train}
        return {"train": train, "validation": _Source(f"{path} (validation)", splits["validation"])}

    def _choose(self, sources: dict[str, _Source]) -> dict[str, list[int]]:
        """Row numbers of each split: MeZO's choice, by a permutation of the rows."""
        numbers: dict[str, list[int]] = {}
        if "validation" in sources:
            numbers["validation"] = self._permutation(sources["validation"])[: self.num_validation]
        if "train" in sources:
            order = self._permutation(sources["train"])
            self.held_out = 0
            if sources["validation"] is sources["train"]:
                self.held_out = min(len(order) // 5, len(numbers["validation"]))
                if self.held_out == 0:
                    where = sources["train"].where
                    raise ValueError(f"{where} has too few rows ({len(order)}) to hold any out: give validation_file")
            rows = len(order) - self.held_out
            rows = rows if self.num_train is None else min(self.num_train, rows)
            numbers["train"] = order[:rows]
            if self.held_out:
                numbers["validation"] = order[rows : rows + self.held_out]
        if "test" in sources:
            numbers["test"] = list(range(len(sources["test"].rows)))
        return numbers

    def _permutation(self, source: _Source) -> list[int]:
        order: list[int] = np.random.RandomState(self.seed).permutation(len(source.rows)).tolist()
        return order

    def _encode(self, source: _Source, numbers: list[int], *, training: bool, labelled: bool) -> _Split:
        tokenizer = self._find_tokenizer()
        split = _Split([], [])
        for index, (number, cells) in enumerate(zip(numbers, source.rows.select(numbers), strict=True)):
            row = Row(cells)
            try:
                example = self.task.example(row)
                if labelled and not example.is_labelled:
                    value = row[self.task.target] if self.task.target not in row else row.get(self.task.target)
                    raise ValueError(f"no label in column {self.task.target!r}: {value!r}")
                encoded = encode_example(tokenizer, self.task, example, index=index, max_length=self.max_length, training=training)
            except ValueError as error:
                raise ValueError(f"{source.where}, row {number}: {error}") from None
            split.examples.append(example)
            split.encoded.append(encoded)
        return split

    def _split(self, name: str) -> _Split:
        if name not in self._splits:
            raise RuntimeError(f"there are no {name} rows yet: call setup() first")
        return self._splits[name]

    def _test_split(self) -> _Split:
        return self._split("test" if self.test_file else "validation")

    def _current_step(self) -> int:
        """Steps taken: the optimizer's own count, which an interrupt cannot tear from the weights; else Lightning's."""
        optimizers = self.trainer.optimizers if self.trainer else []
        steps = getattr(optimizers[0], "steps", None) if optimizers else None
        return steps if steps is not None else self.trainer.global_step if self.trainer else 0

    def _sampler(self, step: Callable[[], int] | int = 0) -> StepKeyedSampler:
        return StepKeyedSampler(len(self._split("train").encoded), self.batch_size, self.seed, step)

    def _collator(self) -> Collator:
        return Collator(self._find_tokenizer(), one_forward=self.one_forward)

    def _evaluation_loader(self, rows: list[Encoded]) -> DataLoader[Encoded]:
        return self._loader(rows, batch_size=self.eval_batch_size)

    def _calibration_loaders(self) -> list[DataLoader[Encoded]]:
        if self.objective != "candidates" or "train" not in self._splits or self.calibration_rows == 0:
            return []
        return [self._evaluation_loader(self._split("train").encoded[: self.calibration_rows])]

    def _loader(self, rows: list[Encoded], **options: Any) -> DataLoader[Encoded]:
        dataset = cast("Dataset[Encoded]", rows)  # a list serves; only the annotation asks for the class
        pinned = torch.cuda.is_available()  # so that copies to the device need not wait
        return DataLoader(dataset, collate_fn=self._collator(), num_workers=self.num_workers, pin_memory=pinned, **options)

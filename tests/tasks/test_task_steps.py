"""The step-keyed order: pure, complete, and the same after a resume in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from zolightning.tasks import StepKeyedSampler, TaskDataModule


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    sampler = StepKeyedSampler(23, 5, seed=3)
    forwards = [sampler.batch(t) for t in range(20)]
    backwards = [StepKeyedSampler(23, 5, seed=3).batch(t) for t in reversed(range(20))]
    assert forwards == backwards[::-1]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert StepKeyedSampler(23, 5, seed=4).batch(0) != forwards[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_repeats_no_row_and_drops_the_rest() -> None:
    sampler = StepKeyedSampler(23, 5)
    assert len(sampler) == 4
    epochs = [list(sampler) for _ in range(3)]
    for epoch in epochs:
        rows = [row for batch in epoch for row in batch]
        assert len(rows) == len(set(rows)) == 20
    assert epochs[0] != epochs[1]
    assert [batch for epoch in epochs for batch in epoch] == [sampler.batch(t) for t in range(12)]


@pytest.mark.parametrize("step", [0, 1, 4, 7, 8, 11])
def test_iteration_starts_at_any_step(step: int) -> None:
    sampler = StepKeyedSampler(23, 5, step=step)
    seen = list(sampler) + list(sampler)
    assert seen == [sampler.batch(t) for t in range(step, step + len(seen))]
    assert (step + len(seen)) % 4 == 0


def test_a_step_function_is_asked_at_each_iteration() -> None:
    step = 2
    sampler = StepKeyedSampler(23, 5, step=lambda: step)
    assert list(sampler) == list(sampler) == [sampler.batch(2), sampler.batch(3)]
    step = 5
    assert list(sampler) == [sampler.batch(t) for t in (5, 6, 7)]


def test_as_a_batch_sampler() -> None:
    sampler = StepKeyedSampler(6, 3)
    loader: DataLoader[Any] = DataLoader(torch.arange(6), batch_sampler=sampler)  # type: ignore[arg-type]
    assert [batch.tolist() for batch in loader] == [sampler.batch(0), sampler.batch(1)]


@pytest.mark.parametrize(
    ("n", "size", "message"),
    [(3, 4, "batch_size 4 is larger than the number of training rows, 3"), (3, 0, "batch_size 0 is not positive")],
)
def test_errors(n: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepKeyedSampler(n, size)


class Recorder(lightning.LightningModule):
    """Counts steps and notes the rows that it sees."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.seen.append(batch["index"].tolist())
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


def fit(
    file: str, tokenizer: Any, folder: Path, steps: int, resume: str | None = None, workers: int = 0, **options: Any
) -> tuple[list[list[int]], lightning.Trainer]:
    data = TaskDataModule(train_file=file, batch_size=4, calibration_rows=0, num_workers=workers)
    module = Recorder(tokenizer)
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module.seen, trainer


@pytest.mark.filterwarnings("ignore")
def test_resume_in_the_middle_of_an_epoch(write: Callable[..., str], tokenizer: Any, tmp_path: Path) -> None:
    file = write("train.jsonl", [{"sentence": f"film {n}", "label": n % 2} for n in range(30)])  # 6 batches an epoch
    whole, _ = fit(file, tokenizer, tmp_path, steps=15)
    order = StepKeyedSampler(24, 4)
    assert whole == [order.batch(t) for t in range(15)]
    for stop in (2, 6, 9):
        first, trainer = fit(file, tokenizer, tmp_path, steps=stop)
        trainer.save_checkpoint(tmp_path / "stop.ckpt")
        rest, _ = fit(file, tokenizer, tmp_path, steps=15, resume=str(tmp_path / "stop.ckpt"))
        assert first + rest == whole


@pytest.mark.filterwarnings("ignore")
def test_short_epochs_with_workers(write: Callable[..., str], tokenizer: Any, tmp_path: Path) -> None:
    file = write("train.jsonl", [{"sentence": f"film {n}", "label": n % 2} for n in range(30)])
    seen, _ = fit(file, tokenizer, tmp_path, steps=5, workers=1, limit_train_batches=2)
    order = StepKeyedSampler(24, 4)
    assert seen == [order.batch(t) for t in range(5)]

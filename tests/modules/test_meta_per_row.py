"""Norms of every row's own gradient, all at once: the same numbers as one row after another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from meta import bound, plain_gradients, token_batch
from nets import hook_count, state_bits, tiny
from torch import Tensor

import zolightning as zl
from zolightning.modules.per_row import row_norms


def losses_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One mean loss per row."""

    def losses() -> Tensor:
        total, weight = bound(model, batch).rows(1)
        return (total / weight)[0]

    return losses


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("qwen2", False), ("gemma", True)])
def test_equals_one_by_one(family: str, tied: bool) -> None:
    model, batch = tiny(family, torch.float64, tied), token_batch(rows=5)
    space, before = zl.DenseSpace(model), state_bits(model)
    together = row_norms(space, losses_of(model, batch), 5)
    expected = torch.zeros(len(space.blocks), dtype=torch.float64)
    for row in range(5):
        gradients = plain_gradients(model, {key: value[row : row + 1] for key, value in batch.items()})
        expected += torch.stack([gradients[block.name].square().sum() for block in space.blocks])
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-20)
    assert state_bits(model) == before
    assert hook_count(model) == 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_several_sequences_a_row() -> None:
    """Candidates of one row are scored together."""
    model = tiny("llama", torch.float64, True)
    space = zl.DenseSpace(model)
    ids = token_batch(rows=6)["input_ids"]
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "scored": torch.full((6,), 2),
        "example": torch.tensor([0, 0, 0, 1, 1, 2]),
        "choice": torch.tensor([0, 1, 2, 0, 1, 0]), "label": torch.tensor([1, 0, 0]),
    }  # fmt: skip
    objective = zl.CandidateCrossEntropy()
    together = row_norms(space, lambda: objective.rows(model, batch)[0], 6, batch["example"])
    expected = torch.zeros(len(space.blocks), dtype=torch.float64)
    for row in range(3):
        loss = objective.rows(model, batch)[0][row]
        gradients = torch.autograd.grad(loss, [block.tensor for block in space.blocks])
        expected += torch.stack([g.square().sum() for g in gradients])
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-20)


@pytest.mark.parametrize("family", ["opt", "mixtral", "mamba"])
def test_what_cannot_be_followed_is_refused(family: str) -> None:
    model, batch = tiny(family, torch.float64), token_batch()
    space, before = zl.DenseSpace(model), state_bits(model)
    with pytest.raises(NotImplementedError, match="is used"):
        row_norms(space, losses_of(model, batch), 4)
    assert state_bits(model) == before
    assert hook_count(model) == 0


def test_only_some_blocks() -> None:
    model, batch = tiny("llama", torch.float64), token_batch(rows=1)
    space = zl.DenseSpace(model, include=["model.layers.1.*"])
    gradients = plain_gradients(model, batch)
    expected = torch.stack([gradients[block.name].square().sum() for block in space.blocks])
    torch.testing.assert_close(row_norms(space, losses_of(model, batch), 1), expected, rtol=1e-10, atol=1e-20)

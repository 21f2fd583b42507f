"""Objectives: both batch forms agree with each other and with a plain computation, however the batch is padded or cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import VOCABULARY, padded, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.objectives import CandidateCrossEntropy, Objective, TokenCrossEntropy, candidate_scores, total
from zolightning.objectives.batch import repeat, size, split
from zolightning.objectives.forward import candidate_logits, forwards

PROMPTS = [[5, 9, 3, 17], [7, 8], [30, 31, 32, 33, 34, 35], [4], [11, 12, 13]]
CHOICES = [20, 21, 22]
LABELS = [0, 2, 1, 1, 0]
# Answers of several lengths; the fourth example has two candidates only.
LONG = [[[40], [41, 42]], [[43, 44, 45], [46]], [[40, 41], [42]], [[50], [51, 52, 53]], [[47, 48], [49, 50]]]
FAMILIES = ["llama", "gpt2", "opt", "qwen2", "gemma"]


def one_token(extra: int = 0) -> dict[str, Any]:
    """Prompts, each with the same three one-token candidates."""
    return {**padded(PROMPTS, extra), "candidates": torch.tensor([CHOICES] * len(PROMPTS)), "label": torch.tensor(LABELS)}


def sequences(answers: list[list[list[int]]], labels: list[int], extra: int = 0) -> dict[str, Any]:
    """One sequence for each candidate of each example."""
    flat = [(b, k, answer) for b, group in enumerate(answers) for k, answer in enumerate(group)]
    return {
        **padded([PROMPTS[b] + answer for b, _, answer in flat], extra),
        "scored": torch.tensor([len(answer) for _, _, answer in flat]),
        "example": torch.tensor([b for b, _, _ in flat]),
        "choice": torch.tensor([k for _, k, _ in flat]),
        "label": torch.tensor(labels),
        "num_choices": max(len(group) for group in answers),
    }


def answers(extra: int = 0) -> dict[str, Any]:
    """One answer of one to three tokens for each prompt."""
    rows = [group[1] for group in LONG]
    return {**padded([p + a for p, a in zip(PROMPTS, rows, strict=True)], extra), "scored": torch.tensor([len(a) for a in rows])}


def log_probs(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """Log-probability of each answer token: one sequence, no padding, all logits."""
    ids = torch.tensor([prompt + answer])
    table = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    return torch.stack([table[len(prompt) + i - 1, token] for i, token in enumerate(answer)])


CASES: dict[str, tuple[Objective, Any]] = {
    "one-token": (CandidateCrossEntropy(), one_token),
    "sequences": (CandidateCrossEntropy(), lambda extra=0: sequences(LONG, [0, 1, 1, 0, 0], extra)),
    "tokens": (TokenCrossEntropy(), answers),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_against_a_plain_computation(family: str) -> None:
    """Length-normalised scores, one sequence at a time."""
    model = tiny(family, torch.float64)
    batch = sequences(LONG, [0, 1, 1, 0, 0])
    expected = torch.stack([torch.stack([log_probs(model, p, a).mean() for a in group]) for p, group in zip(PROMPTS, LONG, strict=True)])
    assert torch.allclose(candidate_scores(model, batch), expected, atol=1e-9)
    loss, weight = CandidateCrossEntropy().rows(model, batch)
    assert torch.allclose(loss, F.cross_entropy(expected, batch["label"], reduction="none"), atol=1e-9)
    assert torch.equal(weight, torch.ones(5, dtype=weight.dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_form_equals_sequence_form(family: str) -> None:
    """The same scores up to a constant for each row, and the same loss."""
    model = tiny(family, torch.float64)
    short, long = one_token(), sequences([[[token] for token in CHOICES]] * len(PROMPTS), LABELS)
    one, many = candidate_scores(model, short), candidate_scores(model, long)
    apart = one - many
    assert torch.allclose(apart, apart[:, :1].expand_as(apart), atol=1e-9)
    assert float(apart.abs().min()) > 0.1, "the normaliser is left out"
    assert torch.allclose(CandidateCrossEntropy().on(model, short)(), CandidateCrossEntropy().on(model, long)(), atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_against_a_plain_computation(family: str) -> None:
    """The mean over all answer tokens, by hand."""
    model = tiny(family, torch.float64)
    loss, weight = TokenCrossEntropy().rows(model, answers())
    expected = [-log_probs(model, p, group[1]) for p, group in zip(PROMPTS, LONG, strict=True)]
    assert torch.allclose(loss, torch.stack([e.sum() for e in expected]), atol=1e-9)
    assert weight.tolist() == [len(e) for e in expected]
    assert torch.allclose(TokenCrossEntropy().on(model, answers())(), torch.cat(expected).mean(), atol=1e-9)


def test_tokens_against_torch() -> None:
    """Where everything after the first token is the answer, it is F.cross_entropy on shifted logits."""
    model, ids = tiny("llama", torch.float64), torch.randint(3, VOCABULARY, (3, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "scored": torch.full((3,), 6), "max_scored": 6}
    logits = model(input_ids=ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(TokenCrossEntropy().on(model, batch)(), expected, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(family: str, case: str) -> None:
    """Five more columns of padding on the left."""
    objective, make = CASES[case]
    model = tiny(family, torch.float64)
    assert torch.allclose(objective.rows(model, make(extra=5))[0], objective.rows(model, make())[0], atol=1e-9)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 9])
def test_micro_batches(case: str, micro_batch_size: int) -> None:
    """The loss of the whole, and the rows in their order."""
    objective, make = CASES[case]
    model, batch = tiny("llama", torch.float64), make()
    whole, cut = objective.on(model, batch), objective.on(model, batch, micro_batch_size)
    assert torch.allclose(cut(), whole(), atol=1e-12)
    for one, two in zip(cut.rows(2), whole.rows(2), strict=True):
        assert one.shape == (2, 5)
        assert torch.allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_two_copies_are_one_copy_twice(case: str, micro_batch_size: int | None) -> None:
    objective, make = CASES[case]
    bound = objective.on(tiny("llama", torch.float64), make(), micro_batch_size)
    for two, one in zip(bound.rows(2), bound.rows(1), strict=True):
        assert one.shape == (1, 5)
        assert torch.allclose(two, one.expand(2, -1), atol=1e-12)
    assert torch.equal(bound(), total(*bound.rows(1))[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_wide(case: str, dtype: torch.dtype) -> None:
    """float32 for 16-bit models, float64 for float64 ones; the values agree."""
    objective, make = CASES[case]
    loss, weight = objective.rows(tiny("llama", dtype), make())
    assert loss.dtype == weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = objective.rows(tiny("llama", torch.float64), make())[0]
    assert torch.allclose(loss.double(), exact, rtol=0.05)


def test_missing_candidates_have_no_weight() -> None:
    """An example with fewer candidates than the others: their score is minus infinity, its loss is over its own."""
    model, ragged = tiny("llama", torch.float64), [[*group, [60]] if b == 0 else group for b, group in enumerate(LONG)]
    scores = candidate_scores(model, sequences(ragged, [2, 1, 1, 0, 0]))
    assert torch.equal(scores.isinf(), torch.tensor([[False, False, b > 0] for b in range(5)]))
    plain = candidate_scores(model, sequences(LONG, [0, 1, 1, 0, 0]))
    assert torch.allclose(scores[:, :2], plain, atol=1e-9)
    rows = CandidateCrossEntropy().on(model, sequences(ragged, [2, 1, 1, 0, 0]), micro_batch_size=2).rows(1)[0][0]
    assert torch.allclose(rows[1:], F.cross_entropy(plain, torch.tensor([0, 1, 1, 0, 0]), reduction="none")[1:], atol=1e-9)


def test_total_is_a_ratio_of_sums() -> None:
    loss, weight = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert total(loss, weight).tolist() == [0.75, 2.0]


@pytest.mark.parametrize("micro_batch_size", [0, -1])
def test_micro_batch_size_out_of_range(micro_batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"micro_batch_size={micro_batch_size} must be at least 1"):
        TokenCrossEntropy().on(nn.Linear(2, 2), answers(), micro_batch_size)


def test_split_and_repeat_keep_every_row() -> None:
    """Cutting keeps an example's sequences together; repeating renumbers the examples."""
    batch = {**sequences([[[40]] * (1 + b % 3) for b in range(5)], LABELS), "text": "kept"}
    parts = list(split(batch, 2))
    assert [size(part) for part in parts] == [2, 2, 1]
    assert [part["example"].tolist() for part in parts] == [[0, 1, 1], [0, 0, 0, 1], [0, 0]]
    for key in ("input_ids", "attention_mask", "scored", "choice", "label"):
        assert torch.equal(torch.cat([part[key] for part in parts]), batch[key])
    assert all(part["text"] == "kept" for part in parts)
    twice = repeat(batch, 2)
    assert twice["example"].tolist() == batch["example"].tolist() + [b + 5 for b in batch["example"].tolist()]
    assert size(twice) == 10
    assert list(split(batch, 5)) == [batch]


def test_only_the_scored_positions_reach_the_head() -> None:
    """The head never sees the prompt."""
    model, seen = tiny("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    CandidateCrossEntropy().on(model, one_token())()
    TokenCrossEntropy().on(model, answers())()
    assert seen == [1, 4]


def test_an_objective_of_ones_own() -> None:
    """The example of the documentation."""

    class LogitPenalty(Objective):
        def rows(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            out = model(batch["input_ids"]).logits.float().square().mean(dim=(1, 2))
            return out, torch.ones_like(out)

    model = tiny("llama")
    expected = model(one_token()["input_ids"]).logits.square().mean()
    assert torch.allclose(LogitPenalty().on(model, one_token(), 2)(), expected, atol=1e-5)


def test_forwards_come_back() -> None:
    """A module's own forward, as accelerate gives it, stays what it was, an error included; others end without one."""
    owner, plain = nn.Linear(2, 2), nn.Linear(2, 2)
    owner.forward = mine = lambda x: x + 1  # type: ignore[method-assign]

    def fail() -> None:
        with forwards({owner: lambda x: 2 * x, plain: lambda x: 3 * x}):
            assert (owner(torch.ones(())), plain(torch.ones(()))) == (2, 3)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert vars(owner)["forward"] is mine
    assert "forward" not in vars(plain)


def test_a_head_with_a_forward_of_its_own_runs_it() -> None:
    model = tiny("llama")
    batch = {
        "input_ids": torch.arange(8).view(2, 4),
        "attention_mask": torch.ones(2, 4, dtype=torch.int64),
        "candidates": torch.tensor([[3, 5]] * 2),
    }
    head = model.get_output_embeddings()
    before, asked = candidate_logits(model, batch), []
    own = head.forward

    def hooked(x: Tensor) -> Tensor:
        asked.append(x)
        return own(x)

    head.forward = hooked
    torch.testing.assert_close(candidate_logits(model, batch), before)
    assert len(asked) == 1
    assert vars(head)["forward"] is hooked

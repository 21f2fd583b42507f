"""Token bookkeeping: what is scored, what is cut, and the two forms of a batch."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zolightning.tasks import Collator, Encoded, Example, TemplateTask, encode, encode_example, get_task

PAIR = TemplateTask("{text}", [" terrible", " great"])
ANSWER = TemplateTask("{text}", answer="answer")


def encoded(tokenizer: Any, task: Any, example: Example, index: int = 0, training: bool = False, length: int = 64) -> Any:
    return encode_example(tokenizer, task, example, index=index, max_length=length, training=training)


def words(tokenizer: Any, ids: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


def test_scored_tokens(tokenizer: Any) -> None:
    ids, scored = encode(tokenizer, "a film It was", " great", 64)
    assert words(tokenizer, ids) == ["<s>", "a", " film", " It", " was", " great"]
    assert scored == 1


def test_spaces_at_the_ends_of_the_prompt_do_not_count(tokenizer: Any) -> None:
    assert encode(tokenizer, " a film so ", "the end ", 64) == encode(tokenizer, "a film so", " the end", 64)


def test_newlines_count(tokenizer: Any) -> None:
    ids, scored = encode(tokenizer, "a\n", "great", 64)
    assert words(tokenizer, ids) == ["<s>", "a", "\n", "great"]
    assert scored == 1


def test_cut_keeps_the_first_token_and_the_continuation(tokenizer: Any) -> None:
    ids, scored = encode(tokenizer, "x " * 50 + "\nIt was", " great okay", 6)
    assert words(tokenizer, ids) == ["<s>", "\n", "It", " was", " great", " okay"]
    assert scored == 2


def test_longest_continuation_that_fits(tokenizer: Any) -> None:
    ids, scored = encode(tokenizer, "x y", " one two", 3)
    assert (words(tokenizer, ids), scored) == (["<s>", " one", " two"], 2)
    with pytest.raises(ValueError, match=r"2 tokens to score need a prompt token .* has 3 and max_length is 2"):
        encode(tokenizer, "x y", " one two", 2)


def test_prompt_without_tokens(make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"1 tokens to score need a prompt token before them: the prompt has 0"):
        encode(make_tokenizer(bos=False), "", "great", 64)


def test_continuation_without_tokens(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="continuation ' ' adds no token to the prompt"):
        encode(tokenizer, "a film", " ", 64)


def test_classes_with_the_same_tokens(tokenizer: Any) -> None:
    task = TemplateTask("{text}", [" great", " unheard", " unseen"])
    with pytest.raises(ValueError, match="candidates ' unheard' and ' unseen' have the same tokens"):
        encoded(tokenizer, task, task.example({"text": "a film"}))


@pytest.mark.parametrize("bos", [True, False])
def test_special_tokens_are_the_tokenizers_own(make_tokenizer: Any, bos: bool) -> None:
    ids, _ = encode(make_tokenizer(bos=bos), "a film", " great", 64)
    assert len(ids) == 3 + bos


def test_one_token(tokenizer: Any) -> None:
    assert encoded(tokenizer, PAIR, Example("a film", (" terrible", " great"), 1)).one_token
    assert not encoded(tokenizer, PAIR, Example("a film", (" terrible", " great end"), 1)).one_token
    # the continuation changes the last token of the prompt
    assert not encoded(tokenizer, PAIR, Example("a", ("great x", "fine y"), 1)).one_token
    mixed = Example("", (" x", " x"), 0, prompts=("one", "two"))
    assert not encoded(tokenizer, PAIR, mixed).one_token


def test_form_a(tokenizer: Any) -> None:
    rows = [
        encoded(tokenizer, PAIR, Example("a fine film . It was", (" terrible", " great"), 1), index=7),
        encoded(tokenizer, PAIR, Example("dull", (" terrible", " great"), None), index=3),
    ]
    batch = Collator(tokenizer, one_forward=True)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "candidates", "label", "index"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert words(tokenizer, batch["input_ids"][0]) == ["<pad>", "<s>", "a", " fine", " film", " .", " It", " was"]
    assert words(tokenizer, batch["input_ids"][1]) == ["<pad>"] * 6 + ["<s>", "dull"]
    assert batch["attention_mask"].sum(1).tolist() == [7, 2]
    assert words(tokenizer, batch["candidates"][0]) == [" terrible", " great"]
    assert batch["label"].tolist() == [1, -1]
    assert batch["index"].tolist() == [7, 3]


def test_form_b(tokenizer: Any) -> None:
    record = get_task("record")
    rows = [
        encoded(tokenizer, record, Example("a film", (" x", " y y", " one"), 1, labels=(1, 2)), index=4),
        encoded(tokenizer, record, Example("a fine film", (" two", " x"), 0), index=9),
    ]
    batch = Collator(tokenizer, one_forward=False)(rows)
    assert (batch.pop("max_scored"), batch.pop("num_choices")) == (2, 3)
    assert set(batch) == {"input_ids", "attention_mask", "scored", "example", "choice", "correct", "label", "index"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"].shape == (5, 8)
    assert batch["scored"].tolist() == [1, 2, 1, 1, 1]
    assert batch["example"].tolist() == [0, 0, 0, 1, 1]
    assert batch["choice"].tolist() == [0, 1, 2, 0, 1]
    assert batch["correct"].tolist() == [0, 1, 1, 1, 0]
    assert batch["label"].tolist() == [1, 0]
    assert batch["index"].tolist() == [4, 9]
    assert words(tokenizer, batch["input_ids"][1]) == ["<pad>"] * 3 + ["<s>", "a", " film", " y", " y"]


def test_gold_training_needs_only_the_right_sequence(tokenizer: Any) -> None:
    row = encoded(tokenizer, get_task("copa"), Example("a film so", (" x", " y y"), 1), training=True)
    batch = Collator(tokenizer, one_forward=False)([row])
    assert batch["choice"].tolist() == [1]
    assert batch["correct"].tolist() == [1]
    assert batch["scored"].tolist() == [2]


def test_one_prompt_per_candidate(tokenizer: Any) -> None:
    row = encoded(tokenizer, get_task("copa"), Example("", (" end", " end"), 0, prompts=("one", "two")))
    assert [words(tokenizer, ids) for ids in row.sequences] == [["<s>", "one", " end"], ["<s>", "two", " end"]]


def test_answer(tokenizer: Any) -> None:
    example = Example("Question one\nAnswer:", (), None, answers=("two", "x"))
    training = Collator(tokenizer, one_forward=False)([encoded(tokenizer, ANSWER, example, training=True)])
    assert training["prompt_ids"].shape[0] == 1  # a reward generates in training too
    batch = Collator(tokenizer, one_forward=False)([encoded(tokenizer, ANSWER, example)])
    assert words(tokenizer, batch["input_ids"][0])[-3:] == ["Answer:", " two", "\n"]
    assert batch["scored"].tolist() == [2]
    assert (batch["label"].tolist(), batch["choice"].tolist(), batch["correct"].tolist()) == ([-1], [0], [1])
    assert words(tokenizer, batch["prompt_ids"][0])[-2:] == ["\n", "Answer:"]
    assert batch["prompt_mask"].sum().item() == 5


def test_prompt_to_generate_from_leaves_room(tokenizer: Any) -> None:
    row = encoded(tokenizer, ANSWER, Example("x " * 90 + "Answer:", (), None, answers=("two",)), length=60)
    assert words(tokenizer, row.prompt) == ["<s>", *[" x"] * 8, " Answer:"]
    with pytest.raises(ValueError, match="max_length 50 leaves no room for a prompt and 50 new tokens"):
        encoded(tokenizer, ANSWER, Example("x", (), None, answers=("two",)), length=50)


def test_answer_to_predict(tokenizer: Any) -> None:
    batch = Collator(tokenizer, one_forward=False)([encoded(tokenizer, ANSWER, Example("one", (), None))])
    assert batch["input_ids"].shape == (0, 0)
    assert batch["scored"].shape == (0,)
    assert batch["prompt_ids"].shape == (1, 8)


def test_padding_token(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(pad=False)
    assert Collator(tokenizer, one_forward=False).pad_id == tokenizer.eos_token_id == 2
    tokenizer.eos_token = None
    assert Collator(tokenizer, one_forward=False).pad_id == 0


@pytest.mark.parametrize("max_length", [64, 5])
def test_both_forms_give_the_same_scores(tokenizer: Any, max_length: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).double().eval()
    texts = ["a fine film . It was", "dull", "the story . It was"]
    rows: list[Encoded] = [encoded(tokenizer, PAIR, Example(text, (" terrible", " great"), 1), length=max_length) for text in texts]

    def log_probabilities(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits
        return logits.log_softmax(-1)

    a = Collator(tokenizer, one_forward=True)(rows)
    scores_a = log_probabilities(a)[:, -1].gather(1, a["candidates"])
    b = Collator(tokenizer, one_forward=False)(rows)
    scores_b = torch.zeros(3, 2, dtype=torch.float64)
    for table, ids, n, e, k in zip(log_probabilities(b), b["input_ids"], b["scored"], b["example"], b["choice"], strict=True):
        scores_b[e, k] = table[-n - 1 : -1].gather(1, ids[-n:, None]).mean()
    torch.testing.assert_close(scores_a, scores_b)


@pytest.mark.parametrize("name", ["sst2", "cb", "rte", "boolq", "wsc", "wic", "multirc", "copa", "squad", "drop"])
def test_a_real_tokenizer_scores_just_the_continuation(name: str, real_tokenizer: Any, shared: Path) -> None:
    task = get_task(name)
    file = next((shared / name).glob("validation.jsonl*"))
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        example = task.example(json.loads(next(iter(lines))))
    row = encoded(real_tokenizer, task, example, length=1024)
    assert row.one_token == (task.objective == "candidates")
    continuations = example.candidates or (f" {example.answers[0]}\n",)
    for ids, scored, continuation in zip(row.sequences, row.scored, continuations, strict=True):
        assert real_tokenizer.decode(ids[-scored:]) == continuation

"""Greedy text: equal to a plain loop row by row, however the batch is padded, up to the end of the line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import padded
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from zolightning.objectives.generate import generate_text

PROMPTS = ["It was", "great", "Where is Rome? It is in the middle of", "a", "terrible terrible", "x y z"]


def prompts(tokenizer: Any, texts: list[str], extra: int = 0) -> dict[str, Any]:
    """Prompts, padded on the left."""
    batch = padded([tokenizer(text)["input_ids"] for text in texts], extra)
    return {"prompt_ids": batch["input_ids"], "prompt_mask": batch["attention_mask"]}


@torch.no_grad()
def greedy(model: nn.Module, tokenizer: Any, text: str, count: int) -> str:
    """One prompt, no padding, no cache, one token after another."""
    newline = tokenizer("\n")["input_ids"][-1]
    ids, new = tokenizer(text)["input_ids"], []
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token in (newline, tokenizer.eos_token_id):
            break
        new.append(token)
    return str(tokenizer.decode(new, skip_special_tokens=True)).split("\n")[0].strip()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_a_plain_loop(family: str, lively: Any, tokenizer: Any) -> None:
    model = lively
    if family == "gpt2":
        torch.manual_seed(0)
        config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6) if parameter.dim() == 2 else None
    expected = [greedy(model, tokenizer, text, 6) for text in PROMPTS]
    assert len(set(expected)) > 2, "the prompts must have different answers for this to test anything"
    assert generate_text(model, tokenizer, prompts(tokenizer, PROMPTS), 6) == expected
    assert generate_text(model, tokenizer, prompts(tokenizer, PROMPTS, extra=7), 6) == expected


def test_length(lively: Any, tokenizer: Any) -> None:
    for count in (1, 3):
        texts = generate_text(lively, tokenizer, prompts(tokenizer, PROMPTS), count)
        assert texts == [greedy(lively, tokenizer, text, count) for text in PROMPTS]


class Scripted(nn.Module):
    """Says the same tokens after every prompt; through the real ``generate`` of transformers it would need weights to match."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens = tokens
        self.asked: dict[str, Any] = {}

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.asked = options
        stops, said = options["eos_token_id"], []
        for token in self.tokens[: options["max_new_tokens"]]:
            said.append(token)
            if token in stops:
                break
        return torch.cat([input_ids, torch.tensor([said] * len(input_ids))], dim=1)


def test_stops_at_the_end_of_the_line(tokenizer: Any) -> None:
    great, newline = tokenizer(" great")["input_ids"], tokenizer("\n")["input_ids"]
    model = Scripted([*great, *newline, *great, *great])
    assert generate_text(model, tokenizer, prompts(tokenizer, ["a", "It was"]), 10) == ["great", "great"]
    assert model.asked["eos_token_id"] == [newline[-1], tokenizer.eos_token_id]
    assert model.asked["do_sample"] is False
    assert model.asked["pad_token_id"] == tokenizer.pad_token_id


def test_a_newline_inside_a_token_ends_the_answer() -> None:
    """Some tokenizers glue the newline to what stands before it, so generation itself runs on."""
    glued = SimpleNamespace(
        eos_token_id=None, pad_token_id=None,
        batch_decode=lambda ids, skip_special_tokens: [" Italy.\nQuestion: Where"] * len(ids),
    )  # fmt: skip

    class Tokenizer(SimpleNamespace):
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [5]}

    model = Scripted([7, 8])
    batch = {"prompt_ids": torch.tensor([[1, 2]]), "prompt_mask": torch.ones(1, 2, dtype=torch.int64)}
    assert generate_text(model, Tokenizer(**vars(glued)), batch, 5) == ["Italy."]
    assert (model.asked["eos_token_id"], model.asked["pad_token_id"]) == ([5], 0)


def test_no_prompts(lively: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"^text is generated only for tasks with a free answer \(squad, drop, or a TemplateTask"):
        generate_text(lively, tokenizer, {"input_ids": torch.ones(1, 2)}, 5)

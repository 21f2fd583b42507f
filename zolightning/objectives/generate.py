"""Greedy text from a batch of prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zolightning.objectives.batch import Batch


def pad_token(tokenizer: Any) -> int:
    """Id that fills a row: the tokenizer's own, else the end of text, else 0."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


@torch.no_grad()
def generate_text(model: nn.Module, tokenizer: Any, batch: Batch, max_new_tokens: int) -> list[str]:
    """Continue every prompt greedily up to the end of its line.

    Args:
        model: Causal language model as of transformers.
        tokenizer: Its tokenizer.
        batch: ``prompt_ids`` and ``prompt_mask``, both ``[B, T]``, padded on the left.
        max_new_tokens: Most tokens to generate.

    Returns:
        ``B`` texts, stripped.

    Raises:
        ValueError: The batch has no prompts to generate from.
    """
    if "prompt_ids" not in batch:
        raise ValueError("text is generated only for tasks with a free answer (squad, drop, or a TemplateTask with answer=...)")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    stops = [token for token in (newline, tokenizer.eos_token_id) if token is not None]
    generate: Any = model.generate
    ids = generate(
        input_ids=batch["prompt_ids"], attention_mask=batch["prompt_mask"], max_new_tokens=max_new_tokens,
        do_sample=False, num_beams=1, eos_token_id=stops, pad_token_id=pad_token(tokenizer),
    )  # fmt: skip
    texts: list[str] = tokenizer.batch_decode(ids[:, batch["prompt_ids"].shape[1] :], skip_special_tokens=True)
    return [text.split("\n")[0].strip() for text in texts]

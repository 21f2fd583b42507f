"""Shapes of well-known models, with random weights: speed and memory do not depend on what the weights are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        **_LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "opt-13b": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 5120, "word_embed_proj_dim": 5120, "ffn_dim": 20480,
        "num_hidden_layers": 40, "num_attention_heads": 40, "max_position_embeddings": 2048,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
#: Shapes whose plain forward is bound by launches, so that compiling it pays.
LAUNCH_BOUND = ("smollm2-135m", "llama-3.2-1b", "tiny")


def make(shape: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model of that shape with random weights, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def batch(model: Any, rows: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens, all visible, with two candidates a row."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    ids = torch.randint(10, vocabulary, (rows, tokens), generator=generator)
    candidates, label = torch.tensor([[5, 6]] * rows), torch.arange(rows) % 2
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "candidates": candidates, "label": label}
    return {name: value.to(device) for name, value in made.items()}

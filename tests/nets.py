"""Small networks and batches that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 64

_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
_NAMES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "opt": {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen2": _GROUPED,
    "gemma": {**_GROUPED, "head_dim": 8},
    "gpt2": {**_NAMES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {**_NAMES, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0, "initializer_range": 0.5},
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}


def tiny(family: str, dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    """A language model of that family with random weights (the same in every dtype), in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CONFIGS[family], tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()


def lm_closure(model: nn.Module) -> Callable[[], Tensor]:
    """Next-token loss on a fixed batch."""
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))

    def closure() -> Tensor:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return closure


class Net(nn.Module):
    """Two linear layers around a norm, with a parameter and a buffer of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.randn(3, generator=generator))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)))) * self.scale + self.offset


def net_closure(model: nn.Module, step: int = 0) -> Callable[[], Tensor]:
    """Classification loss of :class:`Net` on the batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(6, 5, generator=generator).to(dtype), torch.randint(0, 3, (6,), generator=generator)

    def closure() -> Tensor:
        out = model(x)
        return F.cross_entropy(out if dtype == torch.float64 else out.float(), y)

    return closure


def bits(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor: tells -0.0 from 0.0 and compares NaN."""
    return tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def state_bits(model: nn.Module) -> dict[str, bytes]:
    """The raw bytes of all weights and buffers."""
    return {name: bits(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}


def hook_count(model: nn.Module) -> int:
    """Number of forward hooks anywhere in the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def padded(rows: list[list[int]], extra: int = 0) -> dict[str, Tensor]:
    """Token lists as a left-padded batch."""
    width = max(map(len, rows)) + extra
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}

"""Set-up shared by all tests: Triton's interpreter where there is no GPU, one thread, a seeded global random state."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

# In a forked process a second thread would wait for a pool that stayed behind; Lightning starts one unless it finds this.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same global random state for every test."""
    torch.manual_seed(0)


@pytest.fixture
def as_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take the way of captured ones on a CPU too: rehearsed where the batch is of a new shape, then launched instead of replayed."""
    from zolightning.optim import graphs, optimizer
    from zolightning.optim.probing import Form

    def run(self: graphs.StepGraphs, bound: Any, settings: Any) -> tuple[torch.Tensor, ...]:
        batch = graphs.bucket(bound.batch)
        if (key := (settings, graphs._shape(batch))) not in self._captured:
            self._compute(bound.to(batch), False)
            self._captured[key] = None  # type: ignore[assignment]
        return self._compute(bound.to(batch), True)

    monkeypatch.setattr(graphs.StepGraphs, "run", run)
    monkeypatch.setattr(optimizer, "choose_form", lambda *_: Form(paired=True, captured=True, device="cpu"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 30,000 random weights with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("tiny"))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["It was terrible. It was great."] * 50, trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=core.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder

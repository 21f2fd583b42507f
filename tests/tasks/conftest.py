"""What the tests of tasks share: a tiny tokenizer, small files, the real data where there is any."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = "It was terrible great bad good okay a fine film dull story the end . x y so because Question Answer: one two"


def _make_tokenizer(bos: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token a word with the space before it; unknown words share a token."""
    words = WORDS.split()
    vocabulary = ["<unk>", "<s>", "</s>", "<pad>", "\n", *words, *(f" {word}" for word in words)]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated")
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="<pad>" if pad else None)


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return _make_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return _make_tokenizer()


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Sequence[dict[str, Any]]], str]:
    """Write rows as JSON lines; the path as text."""

    def _write(name: str, rows: Sequence[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return _write


@pytest.fixture
def shared() -> Path:
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real task data is not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def real_tokenizer() -> PreTrainedTokenizerFast:
    folder = Path("~/.cache/zolightning-dev/smollm2-135m-instruct").expanduser()
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"the real tokenizer is not here (tools/get_models.py fetches it): {folder}")
    return PreTrainedTokenizerFast.from_pretrained(folder)

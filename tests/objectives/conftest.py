"""A language model with opinions and its tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zolightning.models import load_model, load_tokenizer


@pytest.fixture
def tokenizer(tiny_folder: str) -> Any:
    return load_tokenizer(tiny_folder)


@pytest.fixture
def lively(tiny_folder: str) -> Any:
    """The tiny model with larger weights: different prompts get different answers."""
    model = load_model(tiny_folder, "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model

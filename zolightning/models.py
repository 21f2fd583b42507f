"""Load a causal language model and its tokenizer from the hub or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The small model that comes with the package, and settings that suit it.
DEMO = Path(__file__).parent / "demo" / "model"
DEMO_LR, DEMO_EPS = 2e-4, 1e-3

DType = Literal["float32", "bfloat16", "float16"]


def resolve(pretrained: str) -> str:
    """The folder of the model that comes with the package for ``demo``; anything else is a hub id or folder already."""
    return str(DEMO) if pretrained == "demo" else pretrained


def load_model(
    pretrained: str,
    dtype: DType = "bfloat16",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model onto one device.

    Args:
        pretrained: Hub id or folder; ``demo``: the small model that comes with the package.
        dtype: Type in which the weights are stored and computed with.
        device: Where it goes.
        attn_implementation: Attention code of transformers (``sdpa``, ``eager``, ...); ``None``: its choice.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: ``dtype`` is unknown or the model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if dtype not in get_args(DType):
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(get_args(DType))}")
    transformers_logging.disable_progress_bar()
    try:
        model: PreTrainedModel
        # Under a device context (Lightning sets one) transformers would ask for accelerate.
        with torch.device("cpu"):
            model, info = AutoModelForCausalLM.from_pretrained(
                resolve(pretrained),
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load model {pretrained!r}: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise ValueError(f"{pretrained!r} is no trained causal language model: it has no weights for {missing!r}")
    return model.to(device).eval()


def load_tokenizer(pretrained: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        pretrained: Hub id or folder.
        trust_remote_code: Run Python code that comes with the tokenizer.

    Raises:
        ValueError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(pretrained), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {pretrained!r}: {first_line(error)}") from error
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

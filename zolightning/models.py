"""Load a causal language model and its tokenizer from the hub or a folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The small model that comes with the package, and settings that suit it.
DEMO = Path(__file__).parent / "demo" / "model"
DEMO_LR, DEMO_EPS = 2e-4, 1e-3

DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "fp4", "int8"]


def resolve(pretrained: str) -> str:
    """The folder of the model that comes with the package for ``demo``; anything else is a hub id or folder already."""
    return str(DEMO) if pretrained == "demo" else pretrained


def load_model(
    pretrained: str,
    dtype: DType = "bfloat16",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    double_quantization: bool = False,
) -> PreTrainedModel:
    """Load a causal language model onto one device.

    Args:
        pretrained: Hub id or folder; ``demo``: the small model that comes with the package.
        dtype: Type in which the weights are stored and computed with; of a quantised model: that of the computation and of the
            weights that are not quantised (norms, embeddings, head).
        device: Where it goes.
        attn_implementation: Attention code of transformers (``sdpa``, ``eager``, ...); ``None``: its choice.
        trust_remote_code: Run Python code that comes with the model.
        quantization: Store the linear maps of the layers in 4 bits (``nf4``, ``fp4``) or 8 (``int8``), by bitsandbytes; ``None``: as
            they are.
        double_quantization: Quantise the scales of 4-bit weights too: 0.4 bits a weight less.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: An argument is unknown, bitsandbytes is missing, or the model cannot be loaded.

    References:
        Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (nf4, double quantisation).
        Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022 (without its outliers).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if dtype not in get_args(DType):
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(get_args(DType))}")
    options: dict[str, Any] = {}
    if quantization is not None:
        options = {"quantization_config": _quantised(quantization, dtype, double_quantization), "device_map": {"": device}}
    elif double_quantization:
        raise ValueError("double_quantization=true needs quantization: nf4 or fp4")
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
                **options,
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load model {pretrained!r}: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise ValueError(f"{pretrained!r} is no trained causal language model: it has no weights for {missing!r}")
    if quantization is None:
        return model.to(device).eval()
    _settle(model)
    return model.eval()


def _quantised(quantization: str, dtype: str, double: bool) -> Any:
    """What transformers has to be told.

    Raises:
        ValueError: ``quantization`` is unknown, does not know double quantisation, or bitsandbytes is missing.
    """
    if quantization not in get_args(Quantization):
        raise ValueError(f"quantization={quantization!r} must be one of {', '.join(get_args(Quantization))}")
    if double and quantization == "int8":
        raise ValueError("double_quantization=true is for nf4 and fp4; the scales of int8 are few")
    # It reports every cast of an input of int8, in every forward.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(f"quantization={quantization} needs bitsandbytes: pip install zolightning[quant]") from error
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # outliers would make a batch's rows depend on each other
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _settle(model: nn.Module) -> None:
    """Let packed weights and scales stay where they are from now on.

    On CPUs with AVX512-BF16 a first forward would pack 4-bit weights anew and round their scales to bfloat16; int8 layers take
    their scales out of the weight at the first forward.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt) and module.weight.CB is not None:
            module.init_8bit_state()


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

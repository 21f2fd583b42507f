"""Load a causal language model and its tokenizer from the hub or a folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from zolightning.spaces.packed import scales_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The small model that comes with the package, and settings that suit it.
DEMO = Path(__file__).parent / "demo" / "model"
DEMO_LR, DEMO_EPS = 2e-4, 1e-3

DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "fp4", "int8"]


def resolve(pretrained: str) -> str:
    """The folder of the model that comes with the package for ``demo``; anything else is a hub id or folder already.

    Raises:
        ValueError: It can only be a folder, and is not there.
    """
    path = Path(pretrained).expanduser()
    if not path.is_dir() and (path.is_absolute() or pretrained.startswith((".", "~")) or len(path.parts) > 2):
        raise ValueError(f"model folder {pretrained!r} {'is a file' if path.exists() else 'does not exist'}")
    return str(DEMO) if pretrained == "demo" else str(path) if pretrained.startswith("~") else pretrained


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
            they are in the files, which may be quantised already.
        double_quantization: Quantise the scales of 4-bit weights too: 0.4 bits a weight less.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: An argument is unknown, bitsandbytes is missing, the model cannot be loaded, or it is quantised already in another
            way.

    References:
        Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (nf4, double quantisation).
        Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022 (without its outliers).
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if dtype not in get_args(DType):
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(get_args(DType))}")
    wanted = _wanted(quantization, double_quantization)
    transformers_logging.disable_progress_bar()
    where = resolve(pretrained)
    try:
        stored = _stored(AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load model {pretrained!r}: {first_line(error)}") from error
    if stored is not None:
        stored.check(pretrained, wanted)
    packing = stored or wanted
    options: dict[str, Any] = {"device_map": {"": device}} if packing is not None else {}
    if packing is not None:
        _need_bitsandbytes(f"quantization={packing.kind}" if stored is None else f"{pretrained!r}, quantised as {packing},")
    if wanted is not None and stored is None:
        options["quantization_config"] = wanted.config(getattr(torch, dtype))
    try:
        model: PreTrainedModel
        # Under a device context (Lightning sets one) transformers would ask for accelerate.
        with torch.device("cpu"):
            model, info = AutoModelForCausalLM.from_pretrained(
                where,
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
    if packing is None:
        return model.to(device).eval()
    if stored is not None:
        _forget_reading(model)
    settle(model, getattr(torch, dtype))
    return model.eval()


@dataclass(frozen=True)
class Packing:
    """How weights are quantised.

    Args:
        kind: ``nf4``, ``fp4`` or ``int8``; in files also the name of another method.
        double: Whether the scales are quantised too.
    """

    kind: str
    double: bool = False

    def __str__(self) -> str:
        return self.kind + (" with quantised scales" if self.double else "")

    def check(self, pretrained: str, wanted: Packing | None) -> None:
        """Refuse files that are quantised in a way that is unknown, or not the one wanted.

        Raises:
            ValueError: They are.
        """
        if self.kind not in get_args(Quantization):
            raise ValueError(
                f"{pretrained!r} is quantised by {self.kind}; only bitsandbytes' {', '.join(get_args(Quantization))} are known"
            )
        if wanted is not None and (wanted.kind != self.kind or wanted.double > self.double):
            raise ValueError(f"{pretrained!r} is quantised already, as {self}: quantization={wanted} needs files that are not")

    def config(self, dtype: torch.dtype) -> Any:
        """What transformers has to be told."""
        from transformers import BitsAndBytesConfig

        if self.kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # outliers would make a batch's rows depend on each other
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=self.kind, bnb_4bit_use_double_quant=self.double, bnb_4bit_compute_dtype=dtype
        )


def _wanted(quantization: str | None, double: bool) -> Packing | None:
    """What the arguments ask for.

    Raises:
        ValueError: ``quantization`` is unknown, or does not know double quantisation.
    """
    if quantization is not None and quantization not in get_args(Quantization):
        raise ValueError(f"quantization={quantization!r} must be one of {', '.join(get_args(Quantization))}")
    if double and quantization is None:
        raise ValueError("double_quantization=true needs quantization: nf4 or fp4")
    if double and quantization == "int8":
        raise ValueError("double_quantization=true is for nf4 and fp4; the scales of int8 are few")
    return Packing(quantization, double) if quantization is not None else None


def _stored(config: Any) -> Packing | None:
    """How the files of a model are quantised, by its configuration."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("load_in_4bit"):
        return Packing(str(found.get("bnb_4bit_quant_type", "fp4")), bool(found.get("bnb_4bit_use_double_quant")))
    return Packing("int8" if found.get("load_in_8bit") else str(found.get("quant_method", "another method")))


def _need_bitsandbytes(who: str) -> None:
    """Make sure that bitsandbytes is there, and that it speaks of errors alone.

    Otherwise it reports every cast of an input of int8, and on CPUs with AVX512-BF16, when it is imported, a kernel that nothing here uses.

    Raises:
        ValueError: It is missing.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{who} needs bitsandbytes: pip install zolightning[quant]") from error


def _forget_reading(model: Any) -> None:
    """Let a model that was read packed be saved: transformers would turn round what it did then, and has no way to; none is needed."""
    done = getattr(model, "_weight_conversions", None) or []
    packing = "transformers.integrations.bitsandbytes"
    model._weight_conversions = [c for c in done if all(type(op).__module__ != packing for op in getattr(c, "operations", None) or [])]


def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let packed weights and scales stay where they are from now on, and let files that came packed compute as ours do.

    On CPUs with AVX512-BF16 a first forward would pack 4-bit weights anew and round their scales to bfloat16; int8 layers take
    their scales out of the weight at the first forward, and leave them and a second hold of the weight behind when the model goes to
    another device. Files name a type to compute with, and have int8 outliers.

    Args:
        model: A model with packed weights.
        dtype: The type to compute with.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = dtype, True
        elif isinstance(module, Linear8bitLt):
            module.state.threshold = 0.0
            if module.weight.CB is not None:
                module.init_8bit_state()
            module.__class__ = _travelling(Linear8bitLt)
    model.config.quantization_config.llm_int8_threshold = 0.0


@cache
def _travelling(kind: Any) -> Any:
    """The class of int8 layers whose state follows the weight to other devices; the scales stay the same tensor, in other memory."""

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        kind._apply(self, fn, recurse)
        if self.state.CB is not None:
            self.state.CB = self.weight.data
            self.state.SCB.data = self.state.SCB.data.to(self.weight.device)
        return self

    return type(kind.__name__, (kind,), {"_apply": _apply})


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a model's weights take, the scales of packed ones included.

    Args:
        model: The network.
    """
    tensors: list[Tensor] = list(model.parameters())
    for module in model.modules():
        if (found := scales_of(module)) is not None:
            holder, leaf = found
            tensors += [vars(holder)[leaf], *([holder.state2.absmax] if getattr(holder, "nested", False) else [])]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def load_tokenizer(pretrained: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        pretrained: Hub id or folder.
        trust_remote_code: Run Python code that comes with the tokenizer.

    Raises:
        ValueError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    where = resolve(pretrained)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {pretrained!r}: {first_line(error)}") from error
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

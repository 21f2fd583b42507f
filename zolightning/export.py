"""A trained model as an ordinary Hugging Face folder, with a card that says how it was made."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import zolightning
from zolightning.models import Quantization, load_model

_TAGS = "tags: [zolightning, zeroth-order]"
_CARD = """---
base_model: {base}
library_name: transformers
{tags}
---

# {name}

`{base}`, fine-tuned with forward passes only by zolightning {version}.

| | |
| --- | --- |
| task | {task} |
| steps | {steps} |
| forwards | {forwards} |
| learning rate | {lr} |
| probe distance | {eps} |
| seed | {seed} |
| sampler | {sampler} |
| moved | {blocks} blocks, {parameters} parameters, {dtype} |
| candidate biases | {biases} |
"""


def export_model(
    module: Any,
    checkpoint: dict[str, Any] | None,
    folder: Path,
    task: str = "unknown",
    merge: bool = False,
    requantize: Quantization | None = None,
) -> None:
    """Write model, tokenizer and card.

    An adapter is written as peft writes it, without the base; a quantised model as bitsandbytes packs it.

    Args:
        module: A fine-tuning module with its model loaded.
        checkpoint: The checkpoint that the weights come from, for the card.
        folder: Where to write.
        task: Name of the task, for the card.
        merge: Write a model of ordinary weights instead, in the module's dtype, with the adapter added. The module's model is used up.
        requantize: Merge, and quantise the result again: ``nf4``, ``fp4`` or ``int8``. The folder holds the ordinary weights meanwhile.

    Raises:
        ValueError: The folder cannot be written or holds files that no export has written, or the space moves what the files would not
            hold.
    """
    if folder.is_dir() and any(folder.iterdir()) and not _exported(folder):
        raise ValueError(f"folder {str(folder)!r} holds files that no export has written: name a new one")
    model = module.language_model
    if merge or requantize is not None:
        model = merged(model)
    elif hasattr(model, "peft_config") and any(".lora_" not in b.name and "prompt_encoder" not in b.name for b in module.space.blocks):
        raise ValueError("an adapter's files cannot hold the other weights that this space moves: use --merge=true")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if requantize is not None:
            model = _requantized(model, module, folder, requantize)
        model.save_pretrained(folder)
        module.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(module, checkpoint, folder.name, task), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write the model to {str(folder)!r}: {error.strerror or error}") from error


def _exported(folder: Path) -> bool:
    """Whether an earlier export is there, which a new one may replace."""
    try:
        return _TAGS in (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


@torch.no_grad()
def merged(model: Any) -> Any:
    """The base with ordinary weights: what was packed is unpacked, LoRA is added.

    Args:
        model: A model of transformers, or a peft model around one; it is used up.

    Raises:
        ValueError: It has a prefix, which is no change of weights.
    """
    changes: dict[str, torch.Tensor] = {}
    if hasattr(model, "peft_config"):
        if not hasattr(model.base_model, "unload"):
            raise ValueError("a prefix cannot be merged into the weights: export without --merge")
        layers = model.get_base_model().named_modules()
        changes = {path: layer.get_delta_weight("default") for path, layer in layers if hasattr(layer, "get_delta_weight")}
        model = model.unload()
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    for path, change in changes.items():
        weight = model.get_submodule(path).weight
        weight.copy_((weight.float() + change.float()).to(weight.dtype))
    return model


def _requantized(model: Any, module: Any, folder: Path, kind: Quantization) -> Any:
    """A model of ordinary weights, quantised by way of files: it is never there in both forms."""
    device = next(model.parameters()).device
    with TemporaryDirectory(dir=folder) as whole:
        model.save_pretrained(whole)
        model.to("meta")
        double = module.double_quantization and kind != "int8"
        return load_model(whole, module.dtype_name, device, quantization=kind, double_quantization=double)


def _card(module: Any, checkpoint: dict[str, Any] | None, name: str, task: str) -> str:
    states = (checkpoint or {}).get("optimizer_states") or [{"param_groups": [{}]}]
    group = states[0]["param_groups"][0]
    settings = {key: group.get(key, "-") for key in ("forwards", "lr", "eps", "seed")}
    blocks, biases = module.space.blocks, getattr(module.objective, "biases", None)
    return _CARD.format(
        tags=_TAGS, base=module.pretrained, name=name, version=zolightning.__version__, task=task, steps=group.get("step", 0),
        sampler=type(getattr(module, "sampler", None)).__name__, blocks=len(blocks), parameters=f"{module.space.numel:,}",
        dtype=str(blocks[0].dtype).removeprefix("torch."),
        biases=biases.tolist() if biases is not None else "none", **settings,
    )  # fmt: skip

"""A trained model as an ordinary Hugging Face folder, with a card that says how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zolightning

_CARD = """---
base_model: {base}
library_name: transformers
tags: [zolightning, zeroth-order]
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


def export_model(module: Any, checkpoint: dict[str, Any] | None, folder: Path, task: str = "unknown") -> None:
    """Write model, tokenizer and card.

    Args:
        module: A fine-tuning module with its model loaded.
        checkpoint: The checkpoint that the weights come from, for the card.
        folder: Where to write.
        task: Name of the task, for the card.

    Raises:
        ValueError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        module.language_model.save_pretrained(folder)
        module.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(module, checkpoint, folder.name, task), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write the model to {str(folder)!r}: {error.strerror or error}") from error


def _card(module: Any, checkpoint: dict[str, Any] | None, name: str, task: str) -> str:
    states = (checkpoint or {}).get("optimizer_states") or [{"param_groups": [{}]}]
    group = states[0]["param_groups"][0]
    settings = {key: group.get(key, "-") for key in ("forwards", "lr", "eps", "seed")}
    blocks, biases = module.space.blocks, getattr(module.objective, "biases", None)
    return _CARD.format(
        base=module.pretrained, name=name, version=zolightning.__version__, task=task, steps=group.get("step", 0),
        sampler=type(getattr(module, "sampler", None)).__name__, blocks=len(blocks), parameters=f"{module.space.numel:,}",
        dtype=str(blocks[0].dtype).removeprefix("torch."),
        biases=biases.tolist() if biases is not None else "none", **settings,
    )  # fmt: skip

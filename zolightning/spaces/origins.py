"""Which weight of the base model a block stands beside, under the name that it has there."""

from __future__ import annotations

from typing import Any

from torch import nn

from zolightning.blocks import Origin
from zolightning.spaces.packed import shape_of, unpacked


def origin(model: nn.Module, name: str) -> Origin | None:
    """The origin of a parameter; ``None``: it is a weight of the base model itself, under its own name.

    Args:
        model: A network, perhaps with adapters of peft in and around it.
        name: Name of the parameter.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:end])
        base = getattr(model.get_submodule(path), "base_layer", None)
        if isinstance(base, nn.Module) and parts[end] != "base_layer":
            return beside(model, path, base)
    plain = canonical(model, name)
    if plain == name:
        return None
    tensor = model.get_parameter(name)
    return Origin(plain, tuple(tensor.shape), lambda: tensor)


def beside(model: nn.Module, path: str, module: nn.Module) -> Origin:
    """The weight of a module as an origin.

    Args:
        model: The network.
        path: Name of the module, or of what an adapter has put around it.
        module: The module.
    """
    return Origin(f"{canonical(model, path)}.weight", shape_of(module), lambda: unpacked(module))


def canonical(model: Any, name: str) -> str:
    """A name as the base model has it, without what peft puts around modules."""
    inner = model
    while hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    around = next(path for path, module in model.named_modules() if module is inner)
    return name.removeprefix(f"{around}." if around else "").replace(".base_layer", "")

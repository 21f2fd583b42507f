"""Put an adapter of peft around a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zolightning.spaces.patterns import matching


def require_peft(space: str) -> Any:
    """The package peft.

    Args:
        space: Name of the space that needs it.

    Raises:
        ValueError: It is missing.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{space} needs peft: pip install zolightning[quant]") from error
    return peft


def linear_maps(model: nn.Module, patterns: Sequence[str]) -> list[str] | None:
    """Names of the linear maps that match; ``None`` without patterns: peft's choice for the architecture.

    Raises:
        ValueError: A pattern matches nothing, or there is an adapter already.
    """
    taken = next((name for name, module in model.named_modules() if hasattr(module, "lora_A")), None)
    if taken is not None:
        raise ValueError(f"{taken!r} has an adapter already; the linear maps of a model can have one")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"]
    return matching(names, "linear map", patterns) if patterns else None


@contextmanager
def one_line(what: str, model: nn.Module) -> Iterator[None]:
    """Tell in one line that peft cannot do something.

    Raises:
        ValueError: It cannot.
    """
    try:
        yield
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"peft cannot put {what} on a {type(model).__name__}: {str(error).strip().splitlines()[0]}") from error


def wrap(model: nn.Module, config: Any, seed: int) -> tuple[Any, list[str]]:
    """The peft model around a model, and the names of its own parameters.

    Initial values are drawn on the CPU, so that they are the same everywhere, without a trace in the global random state. The
    parameters of the model stay as free to move as they were: peft freezes them, and other spaces may move them.
    """
    import peft

    free = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what has another name now
        torch.default_generator.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    for parameter in wrapped.parameters():
        parameter.requires_grad_(free.get(id(parameter), True))
    return wrapped, [name for name, parameter in wrapped.named_parameters() if id(parameter) not in free]

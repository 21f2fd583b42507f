"""Activation checkpointing of the decoder layers, in evaluation mode too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from zolightning.objectives.forward import forwards


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Let a backward recompute the inside of each decoder layer instead of keeping it.

    transformers has the same switch, but only in training mode, where dropout is on. The layers are those that it would checkpoint
    (``GradientCheckpointingLayer``). A layer's own hooks run outside, those of its children inside and so again.

    Args:
        model: A network of transformers.

    Raises:
        ValueError: The model has no such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"checkpoint=true: {type(model).__name__} has no layers that transformers can checkpoint")
    # Not reentrant: every tensor's gradient is complete once, whatever shares it. Nothing is random in evaluation mode.
    again = {layer: partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False) for layer in layers}
    with forwards(again):
        yield

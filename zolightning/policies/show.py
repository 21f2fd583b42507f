"""A table and a picture of any policy: how fast each part of the model learns under it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zolightning.policies.base import Policy
from zolightning.policies.features import Features
from zolightning.policies.layout import KINDS

_ROUNDS = 100  # scales that are fed back settle within a few


@torch.no_grad()
def settled(policy: Policy, features: Features) -> Tensor:
    """Raw scales after many steps at the same losses and weights: shape ``[blocks]``; ``features.sigma`` is brought there too."""
    for _ in range(_ROUNDS):
        features.sigma.copy_(policy(features))
    return features.sigma


@torch.no_grad()
def multipliers(policy: Policy, loss: float = 0.5) -> Tensor:
    r"""Factor :math:`\tilde\sigma_i^2` on each block's learning rate, for weights of a typical size: shape ``[blocks]``.

    Args:
        policy: A policy that has its blocks.
        loss: Loss of the previous step at both sides.

    Raises:
        ValueError: The policy has no blocks yet.
    """
    if not policy.blocks:
        raise ValueError("a policy without blocks has nothing to show: bind it to a model's blocks first")
    features = Features.reference(policy.blocks, loss)
    return policy.normalise(settled(policy, features)).square()


def _grid(policy: Policy, loss: float) -> tuple[list[str], dict[int, dict[str, float]], dict[str, float]]:
    """Kinds in the layers; the mean multiplier by layer and kind; the multiplier of each block outside of the layers."""
    values: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    outside = {}
    for block, value in zip(policy.blocks, multipliers(policy, loss).tolist(), strict=True):
        if block.layer is None:
            outside[block.name] = value
        else:
            values[block.layer][block.kind].append(value)
    kinds = [kind for kind in KINDS if any(kind in row for row in values.values())]
    return kinds, {layer: {kind: sum(v) / len(v) for kind, v in values[layer].items()} for layer in sorted(values)}, outside


def describe(policy: Policy) -> str:
    """One line: kind, size, base model, and whether shapes are known."""
    unknown = any(block.shape is None for block in policy.blocks)
    parts = [type(policy).__name__, f"{policy.n_params:,} parameters", f"{len(policy.blocks)} blocks"]
    parts += [f"for {policy.base_model}"] if policy.base_model else []
    parts += ["shapes not recorded: relative to equal blocks"] if unknown else []
    return ", ".join(parts)


def text_table(policy: Policy, loss: float = 0.5) -> str:
    """Multipliers of the learning rate by layer and kind of block (the mean where a layer has several of a kind).

    Args:
        policy: A policy that has its blocks.
        loss: Loss of the previous step at both sides.
    """
    kinds, layers, outside = _grid(policy, loss)
    lines = [describe(policy), f"factor on the learning rate at loss {loss:g}", ""]
    if layers:
        lines.append("layer" + "".join(f"{kind:>10}" for kind in kinds))
    lines += [f"{layer:>5}" + "".join(_cell(row, kind) for kind in kinds) for layer, row in layers.items()]
    lines += [f"{name:<40}{value:>10.3g}" for name, value in outside.items()]
    return "\n".join(lines)


def _cell(row: Mapping[str, float], kind: str) -> str:
    return f"{row[kind]:>10.3g}" if kind in row else f"{'':>10}"


def picture(policy: Policy, path: str | Path, loss: float = 0.5) -> None:
    """Draw the multipliers: a map of layers and kinds, and bars for the blocks outside of the layers.

    Args:
        policy: A policy that has its blocks.
        path: Where the picture goes.
        loss: Loss of the previous step at both sides.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    kinds, layers, outside = _grid(policy, loss)
    height = max(3.0, 0.25 * len(layers) + 1.5)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, height), width_ratios=(3, 1), layout="constrained")
    colours: dict[str, Any] = {"cmap": "RdBu_r", "norm": LogNorm(1e-2, 1e2)}  # white at 1: as fast as uniform scales
    image = [[max(row.get(kind, math.nan), 1e-2) if kind in row else math.nan for kind in kinds] for row in layers.values()]
    if image:
        drawn = left.imshow(image, aspect="auto", origin="lower", **colours)
        figure.colorbar(drawn, ax=left, label="factor on the learning rate")
        left.set_xticks(range(len(kinds)), kinds, rotation=45)
        names = list(layers)
        shown = range(0, len(names), max(1, len(names) // 16))
        left.set_yticks(list(shown), [str(names[i]) for i in shown])
        left.set_ylabel("layer")
    right.barh(range(len(outside)), list(outside.values()))
    right.set_yticks(range(len(outside)), [name.removesuffix(".weight").rpartition(".")[2] for name in outside])
    right.axvline(1.0, color="gray", linestyle=":")
    right.set_xlabel("outside of the layers")
    figure.suptitle(describe(policy), fontsize=10)
    # No date and version inside, so that equal policies give equal files.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)

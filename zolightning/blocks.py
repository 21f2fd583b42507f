"""A block: one tensor that a probe perturbs and an update moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from zolightning.noise import block_id


@dataclass(frozen=True, eq=False)
class Origin:
    """The weight of the base model that a block changes without being it: an adapter's matrices, the scales of a packed weight.

    Args:
        name: Its canonical name in the base model, such as ``model.layers.0.self_attn.q_proj.weight``.
        shape: Its shape, unpacked.
        read: Gives its values.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Block:
    """One perturbable tensor.

    Args:
        name: Canonical (first) name; with the seed it decides the block's noise, and it keys checkpoints and policies.
        tensor: The weights themselves; contiguous, written in place by updates only.
        origin: The weight of the base model that it changes, through which a policy for the base model finds the block; ``None``:
            the tensor is that weight.
    """

    name: str
    tensor: Tensor
    origin: Origin | None = None

    @cached_property
    def id(self) -> int:
        """32-bit id in the noise counter."""
        return block_id(self.name)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.tensor.numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.tensor.element_size()

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the weights are stored."""
        return self.tensor.dtype

    @property
    def weight(self) -> Tensor:
        """The weight of the base model: the tensor itself, or what it changes."""
        return self.tensor if self.origin is None else self.origin.read()


def check_ids(names: Iterable[str]) -> None:
    """Refuse two names that share a noise stream.

    Raises:
        ValueError: Two names have the same 32-bit id.
    """
    seen: dict[int, str] = {}
    for name in names:
        other = seen.setdefault(block_id(name), name)
        if other != name:
            raise ValueError(f"blocks {other!r} and {name!r} would draw the same noise (equal 32-bit ids); rename one of them")

"""What a policy is: it turns what is known of the blocks into one scale per block."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from zolightning.policies import file
from zolightning.policies.features import Features
from zolightning.policies.layout import BlockInfo, Match, match_blocks
from zolightning.policies.normalise import Normaliser

P = TypeVar("P", bound="Policy")


class Policy(nn.Module, ABC):
    r"""Computes raw scales :math:`\sigma_i \ge 0`, one per block; a :class:`Normaliser` gives them their common size.

    A policy holds no blocks until :meth:`bind`, where a fresh one gets its :meth:`initial` parameters and a loaded one is matched to the
    new blocks. Each constructor argument must be kept as an attribute of the same name, since a file stores these; classes are found
    again by their name.

    Args:
        normaliser: Gives the scales their size; without it: exact.

    Attributes:
        blocks: Names and shapes of the blocks; empty before :meth:`bind`.
        base_model: Hub id or folder of the model that the policy is for.
        trained: How it was trained: plain JSON values.
        results: What it achieves: plain JSON values.

    Example:
        >>> class NormsFirst(Policy):
        ...     per_block = ("values",)
        ...
        ...     def initial(self):
        ...         return {"values": torch.tensor([1.0 if block.kind == "norm" else 0.1 for block in self.blocks])}
        ...
        ...     def forward(self, features):
        ...         return self.values.abs()

    References:
        "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv 2510.00419.
    """

    #: Names of the parameters whose first axis runs over the blocks.
    per_block: tuple[str, ...] = ()
    classes: ClassVar[dict[str, type[Policy]]] = {}

    shares: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Policy.classes.get(cls.__name__, cls).__module__ != cls.__module__:  # a notebook may define its own class again
            raise TypeError(f"there is a policy class {cls.__name__} already; files name classes, so choose another name")
        Policy.classes[cls.__name__] = cls

    def __init__(self, normaliser: Normaliser | None = None) -> None:
        super().__init__()
        self.normaliser = normaliser if normaliser is not None else Normaliser()
        self.blocks: tuple[BlockInfo, ...] = ()
        self.base_model = ""
        self.trained: dict[str, Any] = {}
        self.results: dict[str, Any] = {}

    def initial(self) -> dict[str, Tensor]:
        """First values of the parameters that depend on :attr:`blocks`, by attribute; none unless overridden."""
        return {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of :meth:`initial`, without its memory where an argument decides the size: a file is checked against them."""
        return {name: tuple(value.shape) for name, value in self.initial().items()}

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Raw scales of the coming step.

        Device operations only: no ``.item()``, no branch on a value, since the step may be captured in a CUDA graph.

        Args:
            features: What is known of the blocks; not written.

        Returns:
            Shape ``[blocks]``, not negative, differentiable in the policy's parameters.
        """

    def normalise(self, raw: Tensor, active: Tensor | None = None) -> Tensor:
        """Scales as a direction has them.

        Args:
            raw: Raw scales: shape ``[blocks]``.
            active: 1 for a block that moves in the step, else 0: shape ``[blocks]``; ``None``: all move.
        """
        if active is None:
            return self.normaliser(raw, self.shares)
        shares = self.shares * active
        return self.normaliser(raw * active, shares / shares.sum())

    @property
    def n_params(self) -> int:
        """Number of trainable values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def bind(self: P, blocks: Sequence[BlockInfo], match: Match = "exact") -> P:
        """The policy for these blocks; this one stays as it is.

        Args:
            blocks: The blocks of a model.
            match: How the blocks of a loaded policy are matched, see :func:`match_blocks`.

        Returns:
            A copy, or the policy itself where the blocks are its own.

        Raises:
            ValueError: The blocks do not match.
        """
        blocks = tuple(blocks)
        if blocks == self.blocks:
            return self
        other = copy.deepcopy(self)
        other.blocks = blocks
        if self.blocks:
            index = match_blocks(self.blocks, blocks, match)
            values = {name: getattr(self, name).detach()[index] for name in self.per_block}
        else:
            values = other.initial()
        other._hold(values)
        return other

    def _hold(self, values: dict[str, Tensor]) -> None:
        """Take over parameters, and the sizes of the blocks."""
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))
        self.register_buffer("shares", self.normaliser.shares(self.blocks), persistent=False)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, apart from the normaliser."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name != "normaliser"}

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the policy to one safetensors file; see :func:`zolightning.policies.file.write`.

        Raises:
            ValueError: The policy has no blocks yet, or its parameters are not finite.
        """
        if not self.blocks:
            raise ValueError("a policy without blocks has nothing to store: bind it to a model's blocks first")
        description = {
            "kind": type(self).__name__,
            "config": self.config(),
            "normaliser": dataclasses.asdict(self.normaliser),
            "base_model": self.base_model,
            "blocks": [[block.name, None if block.shape is None else list(block.shape)] for block in self.blocks],
            "trained": self.trained,
            "results": self.results,
        }
        return file.write(path, description, self.state_dict(), dtype)

    @classmethod
    def from_pretrained(cls: type[P], path: str | Path) -> P:
        """Read a policy from its file.

        Raises:
            ValueError: There is no such file, it is damaged, or it holds something that this version does not know.
        """
        description, tensors = file.read(path)
        kind = description["kind"]
        try:
            if kind not in Policy.classes:
                raise ValueError(f"{kind[:40]!r} is no known kind of policy ({', '.join(sorted(Policy.classes))}); import its class first")
            if not issubclass(Policy.classes[kind], cls):
                raise ValueError(f"it holds a {kind}, not a {cls.__name__}")
            policy = _build(Policy.classes[kind], description, tensors)
        except ValueError as error:
            raise ValueError(f"policy {str(path)!r}: {error}") from error
        policy.base_model, policy.trained, policy.results = (description[name] for name in ("base_model", "trained", "results"))
        return policy  # type: ignore[return-value]


def _build(kind: type[Policy], description: dict[str, Any], tensors: dict[str, Tensor]) -> Policy:
    """The policy of a file; nothing is allocated before the shapes are known to be those of the file's own tensors."""
    config, known = description["config"], inspect.signature(kind).parameters
    for name in config:
        if name not in known or name == "normaliser":
            raise ValueError(f"{kind.__name__} has no setting {name[:40]!r}")
    try:
        policy = kind(**config)
        policy.normaliser = Normaliser(**description["normaliser"])
        policy.blocks = description["blocks"]
        shapes = policy.shapes()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{kind.__name__} cannot be built as described: {str(error).splitlines()[0]}") from error
    expected = {**{name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}, **shapes}
    for name in sorted(expected.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != expected.get(name):
            raise ValueError(f"tensor {name[:40]!r} has shape {found}, expected {expected.get(name)}")
    policy._hold({name: torch.empty(shape) for name, shape in shapes.items()})
    policy.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    return policy

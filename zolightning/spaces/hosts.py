"""Where perturbed weights are put: the modules whose forward runs with them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.blocks import Block
from zolightning.kernels import Pack, Update, rows
from zolightning.samplers.base import Direction
from zolightning.spaces.late import LateMove
from zolightning.spaces.lazy import Source
from zolightning.spaces.paired import linear_half_by_half

#: A larger matrix is made in pieces of at most half the size, in bytes.
MATRIX_BYTES = 256 << 20
#: A layer is perturbed as a whole, by one launch, up to this size in bytes; in a larger one each matrix where it is read.
LAYER_BYTES = 128 << 20


@dataclass(frozen=True, eq=False)
class Owner:
    """A place where a block hangs: ``slots[leaf]``; tied weights have several.

    Args:
        index: Number of the block.
        path: Name of the module.
        module: The module.
        leaf: Name of the parameter in it.
        holder: The object inside the module of which the block is an attribute; without it: the module's parameter.
    """

    index: int
    path: str
    module: nn.Module
    leaf: str
    holder: object = None

    @property
    def matrix(self) -> bool:
        """Whether it is the matrix of an embedding or a linear map."""
        return self.holder is None and self.leaf == "weight" and isinstance(self.module, nn.Embedding | nn.Linear)

    @property
    def slots(self) -> dict[str, Any]:
        """Where the tensor is looked up by the module's forward."""
        return self.module._parameters if self.holder is None else vars(self.holder)


@dataclass(frozen=True, eq=False)
class View:
    """What a probe shows instead of the weights.

    Args:
        direction: The direction ``u``.
        amounts: Factor of each block's noise: scale times probe distance, ``[blocks]``.
        copies: 1, or 2 for both signs at once.
        paths: Blocks that are not made at all, and what computes with them instead.
        late: The move that has to be made where blocks are read first; ``None``: none waits.
    """

    direction: Direction
    amounts: Tensor
    copies: int = 1
    paths: Mapping[int, Source] = field(default_factory=dict)
    late: LateMove | None = None

    def take(self, indices: Sequence[int]) -> Update | None:
        """The move that has to be made with some blocks; see :meth:`LateMove.take`."""
        return self.late.take(indices) if self.late is not None else None


class Host:
    """A module during whose forward some blocks are perturbed.

    Args:
        path: Name of the module.
        module: The module.
        owners: What is swapped: its own parameters, or those of modules inside.
        blocks: All blocks of the space.
    """

    def __init__(self, path: str, module: nn.Module, owners: Sequence[Owner], blocks: Sequence[Block]) -> None:
        self.path, self.module, self.owners = path, module, tuple(owners)
        self.indices = tuple(dict.fromkeys(owner.index for owner in owners))  # a block tied inside one host is drawn once
        self.blocks = {index: blocks[index] for index in self.indices}
        self._packs: dict[frozenset[int], Pack] = {}  # by the blocks that are left out

    @cached_property
    def lazy(self) -> frozenset[int]:
        """Blocks that are made where they are read: the matrices of embeddings and linear maps, if the host is one or is large."""
        if any(owner.module is not self.module for owner in self.owners) and nbytes(self.blocks.values()) <= LAYER_BYTES:
            return frozenset()
        return frozenset(owner.index for owner in self.owners if owner.matrix)

    def scratch(self, small: Container[int]) -> int:
        """Bytes that a probe needs for one copy of the blocks, without some."""
        at_once = [block for index, block in self.blocks.items() if index not in self.lazy and index not in small]
        one_by_one = [min(block.nbytes, MATRIX_BYTES) for index, block in self.blocks.items() if index in self.lazy and index not in small]
        return nbytes(at_once) + max(one_by_one, default=0)

    def materialise(self, view: View, whole: bool) -> dict[int, Tensor]:
        """The perturbed blocks by number, each ``[copies, *shape]``; ``whole``: the lazy ones too, but not those with a path."""
        without = frozenset(view.paths) if whole else self.lazy.union(view.paths)
        if without not in self._packs:
            indices = [index for index in self.indices if index not in without]
            self._packs[without] = Pack([self.blocks[i].tensor for i in indices], [self.blocks[i].id for i in indices], indices)
        pack = self._packs[without]
        return dict(zip(pack.slots, _pass(pack, self.blocks, view, view.take(pack.slots)), strict=True)) if pack.tensors else {}


class Matrix:
    r"""A matrix :math:`W \pm a z` that is made where it is read; see :class:`zolightning.spaces.lazy.Source`.

    Args:
        index: Number of the block.
        block: The block.
        pieces: Its rows, cut so that each piece is small enough; see :func:`pieces`.
        view: What is shown.
    """

    reading: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, index: int, block: Block, pieces: Sequence[Pack], view: View) -> None:
        self.copies = view.copies
        self._index, self._block, self._pieces, self._view = index, block, pieces, view

    def rows(self, ids: Tensor) -> Tensor:
        view, noise = self._view, self._view.direction.noise(self._block)
        with self.reading():
            if view.late is not None:
                view.late.make([self._index])
            return rows(self._block.tensor, ids, view.amounts, self._index, noise, view.direction.clock, view.copies)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        parts, first = [], 0
        for made in self._made():
            own = bias[..., first : first + made.shape[1]] if bias is not None else None
            parts.append(F.linear(x, made[0], own) if self.copies == 1 else linear_half_by_half(x, made, own))
            first += made.shape[1]
        return _joined(parts, -1)

    def whole(self) -> Tensor:
        return _joined([made[0] for made in self._made()], 0)

    def _made(self) -> Iterator[Tensor]:
        """The pieces, one after another: each ``[copies, rows, H]``."""
        move = self._view.take([self._index])
        for pack in self._pieces:
            with self.reading():
                made = _pass(pack, {self._index: self._block}, self._view, move)[0]
            yield made


def pieces(index: int, block: Block) -> list[Pack]:
    """A matrix cut into rows, of at most half of :data:`MATRIX_BYTES` if it is larger than that, for passes over one after another."""
    height = block.tensor.shape[0]
    rows_each = (
        height if block.nbytes <= MATRIX_BYTES else max(8, (MATRIX_BYTES // 2) * height // block.nbytes // 8 * 8)
    )  # noise comes in eights
    starts = range(0, height, rows_each)
    width = block.numel // max(height, 1)
    return [Pack([block.tensor[s : s + rows_each]], [block.id], [index], [s * width]) for s in starts]


def nbytes(blocks: Iterable[Block]) -> int:
    """Size of some blocks."""
    return sum(block.nbytes for block in blocks)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """Several parts as one; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _pass(pack: Pack, blocks: Mapping[int, Block], view: View, move: Update | None) -> list[Tensor]:
    noises = [view.direction.noise(blocks[index]) for index in pack.slots]
    shown = view.amounts, noises, view.direction.clock, view.copies
    return pack.materialise(*shown) if move is None else pack.advance(move, *shown)


def layer_paths(model: nn.Module) -> list[str]:
    """Names of the repeated layers: the elements of the outermost lists of modules."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists if other != path)]
    return [f"{path}.{number}" for path in outer for number in range(len(model.get_submodule(path)))]  # type: ignore[arg-type]

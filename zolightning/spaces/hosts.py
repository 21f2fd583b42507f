"""Where perturbed weights are put: the modules whose forward runs with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from zolightning.blocks import Block
from zolightning.kernels import Pack, rows
from zolightning.samplers.base import Direction

#: A layer is perturbed as a whole, by one launch, up to this size in bytes; a larger one module by module.
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
    """

    direction: Direction
    amounts: Tensor
    copies: int = 1


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

    @property
    def nbytes(self) -> int:
        """Size of the blocks."""
        return sum(block.numel * block.tensor.element_size() for block in self.blocks.values())

    @cached_property
    def lazy(self) -> frozenset[int]:
        """Blocks that are made where they are read: the matrix of an embedding or linear map that is a host itself."""
        if not isinstance(self.module, nn.Embedding | nn.Linear) or any(owner.module is not self.module for owner in self.owners):
            return frozenset()
        return frozenset(owner.index for owner in self.owners if owner.leaf == "weight")

    @cached_property
    def _packs(self) -> dict[bool, Pack]:
        """All blocks (true), or those that are not lazy (false), for one pass over them."""
        return {whole: self._pack([i for i in self.indices if whole or i not in self.lazy]) for whole in (False, True)}

    @cached_property
    def _matrices(self) -> dict[int, Pack]:
        return {index: self._pack([index]) for index in self.lazy}

    def _pack(self, indices: Sequence[int]) -> Pack:
        blocks = [self.blocks[index] for index in indices]
        return Pack([block.tensor for block in blocks], [block.id for block in blocks], indices)

    def settle(self) -> None:
        """Find the blocks again if they were moved to other memory."""
        for pack in (*self._packs.values(), *self._matrices.values()):
            pack.settle()

    def materialise(self, view: View, whole: bool) -> dict[int, Tensor]:
        """The perturbed blocks by number, each ``[copies, *shape]``; ``whole``: the lazy ones too."""
        return self._pass(self._packs[whole], view) if self._packs[whole].tensors else {}

    def matrix(self, index: int, view: View) -> Tensor:
        """One perturbed block, ``[copies, *shape]``."""
        return self._pass(self._matrices[index], view)[index]

    def matrix_rows(self, index: int, view: View, ids: Tensor) -> Tensor:
        """Rows of a perturbed matrix, ``[*ids.shape, H]``."""
        block = self.blocks[index]
        return rows(block.tensor, ids, view.amounts, index, view.direction.noise(block), view.direction.clock, view.copies)

    def _pass(self, pack: Pack, view: View) -> dict[int, Tensor]:
        noises = [view.direction.noise(self.blocks[index]) for index in pack.slots]
        return dict(zip(pack.slots, pack.materialise(view.amounts, noises, view.direction.clock, view.copies), strict=True))


def layer_paths(model: nn.Module) -> list[str]:
    """Names of the repeated layers: the elements of the outermost lists of modules."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists if other != path)]
    return [f"{path}.{number}" for path in outer for number in range(len(model.get_submodule(path)))]  # type: ignore[arg-type]

"""See every operation inside a probe: who reads a base weight, who writes a weight or buffer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zolightning.blocks import Block

_DROPOUT = (torch.ops.aten.native_dropout, torch.ops.aten.bernoulli, torch.ops.aten.bernoulli_)


class ProbeWatch(TorchDispatchMode):
    """Records what the operations of a probe touch, and stops them before they write a weight or buffer.

    Args:
        model: Its parameters and buffers must not be written.
        blocks: Their tensors must not be read.

    Attributes:
        leaked: Names of blocks whose base tensor was read.
        read: Names of blocks whose perturbed tensor was read.
        dropout: Whether a random mask was drawn.

    Raises:
        ValueError: In the forward, before the write: an operation would write a parameter or buffer.
    """

    def __init__(self, model: nn.Module, blocks: tuple[Block, ...]) -> None:
        super().__init__()
        self._bases = {_address(block.tensor): block.name for block in blocks}
        self._constants = {_address(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
        self._scratch: dict[int, str] = {}
        self._paused = False
        self.leaked: set[str] = set()
        self.read: set[str] = set()
        self.dropout = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the space's own operations pass unseen."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def expect(self, name: str, scratch: Tensor) -> None:
        """Announce the perturbed tensor of a block."""
        self._scratch[_address(scratch)] = name

    def forget(self, scratch: Tensor) -> None:
        """Its memory may be used for something else from now on."""
        self._scratch.pop(_address(scratch), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._paused:
            self._record(func, args, kwargs)
        return func(*args, **kwargs)

    def _record(self, func: Any, args: Any, kwargs: Any) -> None:
        self.dropout |= func.overloadpacket in _DROPOUT
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (address := _address(tensor)):
                if address in self._bases:
                    self.leaked.add(self._bases[address])
                if address in self._scratch:
                    self.read.add(self._scratch[address])
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            self.dropout |= argument.name == "dropout_p" and bool(value)  # fused attention draws its mask itself
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._refuse_write(value)

    def _refuse_write(self, target: Any) -> None:
        for tensor in tree_leaves(target):
            if isinstance(tensor, Tensor) and (address := _address(tensor)) and (name := self._constants.get(address)):
                raise ValueError(f"the model writes {name!r} in its forward; call model.eval(), or it cannot be probed")


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # tensors without storage (sparse, meta) cannot alias a weight
        return 0

r"""A backward pass that hands over one block's gradient at a time and keeps none of them.

Meta-training and its statistics need a few numbers per block, such as :math:`\langle z_i, \nabla_i L\rangle` or
:math:`\|\nabla_i L\|^2`, never the gradient itself. So :func:`backward` calls a *reader* as soon as the gradient of a block is
complete, and drops the gradient at once. What is alive at any moment:

* the weights, once;
* the activations (with ``checkpoint``: the inputs of the decoder layers and the inside of one);
* the gradients of the modules whose backward is running;
* at a shifted point ``theta + a u``: the perturbed weights of the modules that are running. Autograd would keep all of them for
  the backward, a second copy of the model; it is given a recipe instead and draws them again (:class:`Shift`).

A large linear layer with weights of its own (an untied vocabulary projection) never exists as a whole, neither perturbed nor as
a gradient: both are made a few rows at a time.

A reader may also *change* the block, since nobody reads it any more in this pass: autograd hands a gradient over when all uses
of the tensor have contributed (both uses of a tied embedding), and a checkpointed layer is recomputed before its own gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning import kernels
from zolightning.modules.checkpointing import checkpointed
from zolightning.modules.shift import Shift, Swap
from zolightning.optim.optimizer import exact_float32
from zolightning.spaces import Space

_PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}  # elements; as the noise, on a CPU below PyTorch's threading grain
LARGE = 1 << 26  # elements from which a linear layer is handled by rows


class Gradient(ABC):
    """The gradient of one block, complete; only valid while a reader runs.

    Args:
        dtype: Type of the pieces: float32, or float64 for float64 weights.
        loss_scale: Factor that the loss was multiplied by; taken out of the pieces.
    """

    def __init__(self, dtype: torch.dtype, loss_scale: float = 1.0) -> None:
        self.dtype, self.loss_scale = dtype, loss_scale

    @abstractmethod
    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """The whole gradient, in order, as ``(start, flat elements)``, in the type that autograd computes."""

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """Walk over the flat gradient: ``(start, stop, elements)``; may be called again for another walk."""
        for first, flat in self.parts():
            step = _PIECE.get(flat.device.type, _PIECE["cpu"])
            for start in range(0, flat.numel(), step):
                piece = flat[start : start + step].to(self.dtype)
                yield first + start, first + start + piece.numel(), piece if self.loss_scale == 1 else piece / self.loss_scale


class DenseGradient(Gradient):
    """A gradient that autograd has made."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype, loss_scale: float = 1.0) -> None:
        super().__init__(dtype, loss_scale)
        self.tensor = tensor

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.tensor.reshape(-1)


class LinearGradient(Gradient):
    r"""The gradient of a linear layer, :math:`\sum_t y_t x_t^\top`, made a few rows at a time.

    Args:
        inputs: ``x``, shape ``[tokens, in]``.
        outputs: Gradient of the layer's outputs, ``[tokens, out]``.
        rows: Rows at a time.
        dtype: Type of the pieces.
        loss_scale: Factor that the loss was multiplied by.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, rows: int, dtype: torch.dtype, loss_scale: float = 1.0) -> None:
        super().__init__(dtype, loss_scale)
        self.inputs, self.outputs, self.rows = inputs, outputs, rows

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        width = self.inputs.shape[1]
        for row in range(0, self.outputs.shape[1], self.rows):
            yield row * width, (self.outputs[:, row : row + self.rows].t() @ self.inputs).view(-1)


#: Called once for each block that the loss depends on: ``reader(index, gradient)``.
Reader = Callable[[int, Gradient], None]


def backward(
    space: Space, loss: Callable[[], Tensor], *readers: Reader, shift: Shift | None = None, checkpoint: bool = False, large: int = LARGE
) -> Tensor:
    """The gradient of a loss, block by block.

    Args:
        space: Whose blocks; other parameters count as constants.
        loss: Evaluates the 0-d loss with the model of the space.
        readers: Each is called for every block, in the order in which gradients are complete.
        shift: Take the gradient at a shifted point; without it: at the weights as they are.
        checkpoint: Keep only the inputs of the decoder layers and compute their inside twice.
        large: Elements from which a linear layer with weights of its own is handled by rows.

    Returns:
        The loss, detached.

    Raises:
        RuntimeError: A large linear layer is used twice.

    Example:
        >>> norms = SquaredNorms(space)
        >>> loss = backward(space, objective.on(model, batch), norms)
        >>> norms.values  # ||gradient||^2 of each block
    """
    scale = loss_scale(space)
    seen: set[int] = set()

    def read(index: int, gradient: Gradient) -> None:
        if index in seen:
            raise RuntimeError(f"{space.blocks[index].name!r} is used twice in one loss; evaluate the whole batch in one forward")
        seen.add(index)
        with torch.no_grad():
            for reader in readers:
                reader(index, gradient)

    with ExitStack() as stack:
        stack.enter_context(exact_float32())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_gradients_of(space, read, scale))
        by_rows = stack.enter_context(_by_rows(space, read, shift, large, scale))
        if shift is not None:
            stack.enter_context(Swap(space, shift, leave=by_rows))
        if checkpoint:
            stack.enter_context(checkpointed(space.model))
        value = loss()
        (value * scale if scale != 1 else value).backward()
    return value.detach()


def loss_scale(space: Space) -> float:
    """Factor on the loss of float16 weights, whose small gradients would vanish; what overflows is seen as not finite."""
    return 1024.0 if any(block.dtype == torch.float16 for block in space.blocks) else 1.0


@contextmanager
def _gradients_of(space: Space, read: Reader, scale: float) -> Iterator[None]:
    """Hooks that hand over and drop each block's gradient; everything that is no block needs none."""
    own = {id(block.tensor) for block in space.blocks}
    frozen = [p for p in space.model.parameters() if p.requires_grad and id(p) not in own]
    handles = []

    def hand_over(index: int) -> Callable[[Tensor], None]:
        def hook(tensor: Tensor) -> None:
            if tensor.grad is None:  # a layer by rows has handed it over itself
                return
            read(index, DenseGradient(tensor.grad, kernels.compute_dtype(tensor.dtype), scale))
            tensor.grad = None

        return hook

    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for index, block in enumerate(space.blocks):
            block.tensor.grad = None
            handles.append(block.tensor.register_post_accumulate_grad_hook(hand_over(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in space.blocks:
            block.tensor.grad = None  # left over only where the backward was interrupted
        for parameter in frozen:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class _RowsOf:
    """A large weight, a few rows at a time, shifted where asked."""

    index: int
    weight: Tensor
    shift: Shift | None
    rows: int
    read: Reader
    loss_scale: float

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        for row in range(0, self.weight.shape[0], self.rows):
            rows = slice(row, row + self.rows)
            part = self.weight.detach()[rows]
            yield rows, part if self.shift is None else self.shift.rows(self.index, part, row * self.weight.shape[1])


class _LinearByRows(torch.autograd.Function):
    """``x W^T`` that keeps ``x`` alone, and hands the gradient of ``W`` to the reader itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, by_rows: _RowsOf) -> Tensor:
        ctx.by_rows = by_rows
        ctx.save_for_backward(x)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        for rows, part in by_rows.parts():
            out[..., rows] = F.linear(x, part)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,), by_rows = ctx.saved_tensors, ctx.by_rows
        back = torch.zeros_like(x)
        for rows, part in by_rows.parts():
            back += gradient[..., rows] @ part
        dtype = kernels.compute_dtype(by_rows.weight.dtype)
        flat = x.flatten(0, -2), gradient.flatten(0, -2)
        by_rows.read(by_rows.index, LinearGradient(*flat, by_rows.rows, dtype, by_rows.loss_scale))
        return back, None, None  # the reader has had the gradient of the weight


@contextmanager
def _by_rows(space: Space, read: Reader, shift: Shift | None, large: int, scale: float) -> Iterator[frozenset[int]]:
    """Let large linear layers run by rows; yields the indices of their blocks."""
    uses: dict[int, int] = {}
    for module in space.model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    indices = {id(block.tensor): index for index, block in enumerate(space.blocks)}
    layers: list[tuple[int, nn.Linear]] = []
    for module in space.model.modules():
        if type(module) is nn.Linear and uses[id(module.weight)] == 1 and module.weight.numel() >= large and id(module.weight) in indices:
            layers.append((indices[id(module.weight)], module))

    def forward(layer: nn.Linear, by_rows: _RowsOf) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            out: Tensor = _LinearByRows.apply(x, layer.weight, by_rows)
            return out if layer.bias is None else out + layer.bias

        return run

    try:
        for index, layer in layers:
            rows = max(1, (large // 4) // layer.in_features)
            layer.forward = forward(layer, _RowsOf(index, layer.weight, shift, rows, read, scale))  # type: ignore[method-assign, assignment]
        yield frozenset(index for index, _ in layers)
    finally:
        for _, layer in layers:
            layer.__dict__.pop("forward", None)

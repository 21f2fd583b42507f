r"""A backward pass that hands over one block's gradient at a time and keeps none of them.

Meta-training and its statistics need a few numbers per block, such as :math:`\langle z_i, \nabla_i L\rangle` or
:math:`\|\nabla_i L\|^2`, never the gradient itself. So :func:`backward` calls a *reader* as soon as the gradient of a block is
complete, and drops the gradient at once. What is alive at any moment:

* the weights, once;
* the activations (with ``checkpoint``: the inputs of the decoder layers and the inside of one);
* the gradients of the modules whose backward is running;
* at a shifted point ``theta + a u``: the perturbed weights of the modules that are running. Autograd would keep all of them for
  the backward, a second copy of the model; it is given a recipe instead and draws them again (:mod:`zolightning.modules.swap`);
* of a large matrix not even that: it is perturbed, multiplied and differentiated a few rows at a time
  (:mod:`zolightning.modules.by_rows`).

A reader may also *change* the block, since nobody reads it any more in this pass: autograd calls when all uses of the tensor have
contributed (both uses of a tied embedding), and a checkpointed layer is recomputed before its own gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from zolightning import kernels
from zolightning.modules.checkpointing import checkpointed
from zolightning.modules.gradient import DenseGradient, Gradient, Scaling, SumGradient
from zolightning.modules.shift import Shift
from zolightning.modules.swap import Swap
from zolightning.optim.precision import exact_float32
from zolightning.samplers.base import Direction
from zolightning.spaces import Space

LARGE = 1 << 24  # elements from which a matrix goes by rows, about that many at a time

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
        large: Elements from which the matrix of a linear map or embedding goes by rows.

    Returns:
        The loss, detached.

    Example:
        >>> norms = SquaredNorms(space)
        >>> loss = backward(space, objective.on(model, batch), norms)
        >>> norms.values  # ||gradient||^2 of each block
    """
    factor, uses = loss_scale(space), defaultdict[int, list[Gradient]](list)

    def scaling(index: int) -> Scaling:
        tensor = space.blocks[index].tensor
        width = tensor.shape[-1] if tensor.dim() > 1 else 1
        return Scaling(kernels.compute_dtype(tensor.dtype), factor, max(large // width, 1) * width)

    def keep(index: int, gradient: Gradient) -> None:
        uses[index].append(gradient)

    def complete(index: int, tensor: Tensor) -> None:
        own = uses.pop(index, [])
        if tensor.grad is not None:
            own.append(DenseGradient(tensor.grad, scaling(index)))
        with torch.no_grad():
            for reader in readers:
                reader(index, own[0] if len(own) == 1 else SumGradient(own))
        tensor.grad = None

    with ExitStack() as stack:
        stack.enter_context(exact_float32())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_gradients_of(space, complete))
        stack.enter_context(Swap(space, shift, large, scaling, keep))
        if checkpoint:
            stack.enter_context(checkpointed(space.model))
        value = loss()
        (value * factor if factor != 1 else value).backward()
    return value.detach()


@torch.no_grad()
def verify_shift(space: Space, loss: Callable[[], Tensor], direction: Direction, eps: float = 1e-2, checkpoint: bool = False) -> None:
    """Make sure that :func:`backward` at a shifted point sees what a probe sees; the space verifies the probe itself.

    Args:
        space: Whose blocks.
        loss: Evaluates the loss.
        direction: A direction.
        eps: Distance, large enough for a weight that is missed to show.
        checkpoint: As for :func:`backward`.

    Raises:
        ValueError: The model reads weights outside of the forward of the modules that own them.
    """
    expected = space.verify(loss, direction, eps).loss
    found = float(backward(space, loss, shift=Shift(space, direction, eps), checkpoint=checkpoint))
    if abs(found - expected) > 1e-3 * max(abs(expected), 1.0):  # NaN passes here and is seen in the figures
        raise ValueError(
            f"the loss at a probe is {expected:g}, with gradients {found:g}: this model reads weights outside of their modules' forward"
        )


def loss_scale(space: Space) -> float:
    """Factor on the loss of float16 weights, whose small gradients would vanish; what overflows is seen as not finite."""
    return 1024.0 if any(block.dtype == torch.float16 for block in space.blocks) else 1.0


@contextmanager
def _gradients_of(space: Space, complete: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hooks that tell when a block's gradient is complete; everything that is no block needs none."""
    own = {id(block.tensor) for block in space.blocks}
    frozen = [p for p in space.model.parameters() if p.requires_grad and id(p) not in own]
    handles: list[Any] = []

    def hook_of(index: int) -> Callable[[Tensor], None]:
        return lambda tensor: complete(index, tensor)

    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for index, block in enumerate(space.blocks):
            block.tensor.grad = None
            handles.append(block.tensor.register_post_accumulate_grad_hook(hook_of(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in space.blocks:
            block.tensor.grad = None  # left over only where the backward was interrupted
        for parameter in frozen:
            parameter.requires_grad_(True)

"""What can be read off a gradient while it passes: readers for :func:`zolightning.modules.gradients.backward`."""

from __future__ import annotations

import torch
from torch import Tensor

from zolightning.blocks import Block
from zolightning.kernels import drawn, stochastic_round
from zolightning.modules.gradient import Gradient
from zolightning.noise import Key, rounding_bits
from zolightning.samplers.base import Direction
from zolightning.spaces import Space

_WHOLE = 1 << 26  # elements up to which a block's noise is drawn at once


class _Scalars:
    """One number per block, summed over backward passes.

    Args:
        space: Whose blocks.

    Attributes:
        values: Shape ``[blocks]``, the space's compute type, on its device; zero where a block has had no gradient.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.values = torch.zeros(len(space.blocks), dtype=space.compute_dtype, device=space.device)


class SquaredNorms(_Scalars):
    r""":math:`\|g_i\|^2`."""

    def __call__(self, index: int, gradient: Gradient) -> None:
        for _, _, piece in gradient.pieces():
            self.values[index].add_(torch.dot(piece, piece))


class InnerProducts(_Scalars):
    r""":math:`\langle z_i, g_i\rangle` with the noise of a direction (its scales left out), drawn again piece by piece.

    Args:
        space: Whose blocks.
        direction: Names the noise.
    """

    def __init__(self, space: Space, direction: Direction) -> None:
        super().__init__(space)
        self.direction = direction

    def __call__(self, index: int, gradient: Gradient) -> None:
        block = self.space.blocks[index]
        noise = self.direction.noise(block)
        whole = None
        if block.tensor.is_cuda and block.numel <= _WHOLE:  # a kernel is far faster than drawing in plain torch
            whole = drawn(noise, block.numel, block.tensor.device)
        for start, stop, piece in gradient.pieces():
            z = noise.draw(start, stop - start, piece.device) if whole is None else whole[start:stop]
            self.values[index].add_(torch.dot(piece, z.to(piece.dtype)))


class Sum:
    """The weighted sum of all gradients so far: a second copy of the weights, in the space's compute type.

    Args:
        space: Whose blocks.
        device: Where it is held, ``cpu`` for models that fill the accelerator; without it: beside the weights.

    Attributes:
        weight: Of the gradients that come next.
    """

    def __init__(self, space: Space, device: torch.device | str | None = None) -> None:
        self.weight = 1.0
        self.held = [
            torch.zeros(block.numel, dtype=space.compute_dtype, device=device if device is not None else block.tensor.device)
            for block in space.blocks
        ]

    def __call__(self, index: int, gradient: Gradient) -> None:
        for start, stop, piece in gradient.pieces():
            self.held[index][start:stop] += self.weight * piece.to(self.held[index].device)

    def scale(self, factor: float) -> None:
        """Multiply the sum; 0 empties it, whatever it held."""
        for held in self.held:
            held.zero_() if factor == 0 else held.mul_(factor)

    def squared_norms(self) -> Tensor:
        """Squared norm of each block: shape ``[blocks]``."""
        return torch.stack([torch.stack([part @ part for part in held.split(1 << 22)]).sum() for held in self.held])


class ClippedStep:
    r"""The plain gradient step of each block, taken as soon as its gradient has passed.

    .. math:: W_i \leftarrow W_i - \eta\, g_i \min(1, c / \|g_i\|)

    16-bit weights are rounded stochastically; a gradient whose norm is not finite leaves its block as it is.

    Args:
        space: Whose blocks.
        lr: Learning rate.
        clip: Largest norm ``c`` of a block's gradient.
        seed: Seed of the rounding.
        step: Number of the step, for the rounding.
    """

    def __init__(self, space: Space, lr: float, clip: float, seed: int = 0, step: int = 0) -> None:
        self.space, self.lr, self.clip, self.seed, self.step = space, lr, clip, seed, step

    def __call__(self, index: int, gradient: Gradient) -> None:
        block = self.space.blocks[index]
        squared = torch.zeros((), dtype=gradient.dtype, device=block.tensor.device)
        for _, _, piece in gradient.pieces():
            squared += torch.dot(piece, piece)
        rate = self.lr * (self.clip / squared.sqrt()).clamp(max=1.0)
        descend(block, gradient, rate, Key(self.seed, block.id, self.step))


def descend(block: Block, gradient: Gradient, rate: Tensor, key: Key) -> None:
    r"""In-place step :math:`W \leftarrow W - r\, g`; 16-bit weights are rounded stochastically.

    Args:
        block: What moves; a step that is not finite leaves its elements as they are.
        gradient: The gradient ``g``.
        rate: The factor ``r``: 0-d, in the gradient's type, on the weights' device.
        key: Names the rounding bits.
    """
    target = block.tensor.detach().view(-1)
    for start, stop, piece in gradient.pieces():
        old = target[start:stop]
        moved = old.to(gradient.dtype) - rate * piece.to(old.device)
        valid = torch.isfinite(moved)
        if block.dtype in (torch.bfloat16, torch.float16):
            moved = stochastic_round(moved, rounding_bits(key, start, stop - start, old.device), block.dtype)
        target[start:stop] = torch.where(valid, moved.to(block.dtype), old)

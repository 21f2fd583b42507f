"""The gradient of one block, in pieces: as autograd makes it, or made only while it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}  # elements; as the noise, on a CPU below PyTorch's threading grain


@dataclass(frozen=True)
class Scaling:
    """How the pieces of a gradient come.

    Args:
        dtype: Type of the pieces: float32, or float64 for float64 weights.
        factor: What the loss was multiplied by; taken out of the pieces.
        step: Elements of a part that is made at once.
    """

    dtype: torch.dtype
    factor: float = 1.0
    step: int = 1 << 24


class Gradient(ABC):
    """The gradient of one block, complete; only valid while a reader runs.

    Args:
        scaling: How the pieces come.
    """

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling

    @property
    def dtype(self) -> torch.dtype:
        """Type of the pieces."""
        return self.scaling.dtype

    @abstractmethod
    def parts(self) -> Iterator[Tensor]:
        """The whole gradient in order, flat, about ``step`` elements at a time, the loss's factor still in."""

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """Walk over the flat gradient: ``(start, stop, elements)``; may be called again for another walk."""
        start = 0
        for part in self.parts():
            for piece in part.split(_PIECE.get(part.device.type, _PIECE["cpu"])):
                own = piece.to(self.dtype)
                yield start, start + own.numel(), own if self.scaling.factor == 1 else own / self.scaling.factor
                start += own.numel()


class DenseGradient(Gradient):
    """A gradient that is there as a tensor."""

    def __init__(self, tensor: Tensor, scaling: Scaling) -> None:
        super().__init__(scaling)
        self.tensor = tensor

    def parts(self) -> Iterator[Tensor]:
        yield from self.tensor.reshape(-1).split(self.scaling.step)


class LinearGradient(Gradient):
    r"""The gradient of a linear layer's matrix, :math:`\sum_t y_t x_t^\top`, a few rows at a time.

    Args:
        inputs: ``x``, shape ``[tokens, in]``.
        outputs: Gradient of the layer's outputs ``y``: ``[tokens, out]``.
        scaling: How the pieces come; ``step`` is a multiple of ``in``.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, scaling: Scaling) -> None:
        super().__init__(scaling)
        self.inputs, self.outputs = inputs, outputs

    def parts(self) -> Iterator[Tensor]:
        for columns in self.outputs.split(self.scaling.step // self.inputs.shape[1], dim=1):
            yield (columns.t() @ self.inputs).view(-1)


class LookupGradient(Gradient):
    """The gradient of a matrix of which some rows were looked up, a few rows at a time.

    Args:
        ids: Which rows: ``[tokens]``.
        outputs: Gradient of what was found: ``[tokens, width]``.
        count: Rows of the matrix.
        scaling: How the pieces come; ``step`` is a multiple of the width.
    """

    def __init__(self, ids: Tensor, outputs: Tensor, count: int, scaling: Scaling) -> None:
        super().__init__(scaling)
        self.ids, self.outputs, self.count = ids, outputs, count

    def parts(self) -> Iterator[Tensor]:
        width, outputs = self.outputs.shape[1], self.outputs.to(self.dtype)
        rows = self.scaling.step // width
        for first in range(0, self.count, rows):
            own = min(rows, self.count - first)
            inside = (self.ids >= first) & (self.ids < first + own)
            place = torch.where(inside, self.ids - first, own)  # the others go to a row that is thrown away
            yield outputs.new_zeros(own + 1, width).index_add_(0, place, outputs)[:own].view(-1)


class SumGradient(Gradient):
    """The gradient of a block with several uses.

    Args:
        uses: Its terms, all with the same scaling.
    """

    def __init__(self, uses: Sequence[Gradient]) -> None:
        super().__init__(uses[0].scaling)
        self.uses = uses

    def parts(self) -> Iterator[Tensor]:
        for parts in zip(*(use.parts() for use in self.uses), strict=True):
            total = parts[0].to(self.dtype)
            for part in parts[1:]:
                total = total + part
            yield total

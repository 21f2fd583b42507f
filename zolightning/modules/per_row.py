"""Squared norms of every row's own gradient, from one backward pass over many rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zolightning import kernels
from zolightning.modules.by_rows import without_padding
from zolightning.modules.gradients import backward, loss_scale
from zolightning.modules.readers import SquaredNorms
from zolightning.modules.shift import owned_blocks
from zolightning.objectives.base import Objective
from zolightning.objectives.batch import Batch, split
from zolightning.objectives.forward import forwards
from zolightning.optim.precision import exact_float32
from zolightning.spaces import Space

log = logging.getLogger("zolightning")


def row_norms(space: Space, losses: Callable[[], Tensor], sequences: int, example: Tensor | None = None) -> Tensor:
    r"""Sum over the rows of :math:`\|\nabla_i \ell_b\|^2`.

    Matrix products, embeddings and norms are followed one by one: each makes the gradients of all rows for its own weights, which
    live until their norms are taken. Memory beside the activations: rows times the largest block.

    Args:
        space: Whose blocks.
        losses: Evaluates one loss per row, ``[B]``, in one forward.
        sequences: Length of the first axis of the activations.
        example: Row of each sequence, ``[sequences]``; without it: one sequence a row.

    Returns:
        Shape ``[blocks]``, the space's compute type.

    Raises:
        NotImplementedError: A block is used in a way that is not followed.
    """
    tape, scale = _Tape(space, sequences, example), loss_scale(space)
    with exact_float32(), torch.enable_grad(), _vectors(space, tape), tape:
        (losses().sum() * scale).backward()
        missed = [block.name for index, block in enumerate(space.blocks) if tape.left[index] or block.tensor.grad is not None]
    if missed:
        raise NotImplementedError(f"{missed[0]!r} is used in a way that is not followed row by row")
    return tape.values / scale**2


class RowNorms:
    """The sum over the rows of a batch of their gradients' squared norms: many rows at a time where the model allows it.

    Args:
        space: Whose blocks.
        together: Rows per backward; 1: one by one, always possible.
        checkpoint: Checkpoint the decoder layers where rows are taken one by one.
    """

    def __init__(self, space: Space, together: int = 8, checkpoint: bool = False) -> None:
        if together < 1:
            raise ValueError(f"together={together} must be at least 1")
        self.space, self.together, self.checkpoint = space, together, checkpoint
        self._trusted = False

    def __call__(self, objective: Objective, batch: Batch, factor: float = 1.0) -> Tensor:
        """Sum over the rows: shape ``[blocks]``.

        Args:
            objective: Gives one loss sum per row.
            batch: The rows.
            factor: On every loss.
        """
        if self.together > 1 and not self._trusted:
            self._trusted = self._check(objective, next(split(batch, 2)))
            self.together = self.together if self._trusted else 1
        measure = self._many if self.together > 1 else self._one
        return torch.stack([measure(objective, part, factor) for part in split(batch, self.together)]).sum(0)

    def _one(self, objective: Objective, row: Batch, factor: float = 1.0) -> Tensor:
        norms = SquaredNorms(self.space)
        backward(self.space, lambda: objective.rows(self.space.model, row)[0].sum() * factor, norms, checkpoint=self.checkpoint)
        return norms.values

    def _many(self, objective: Objective, rows: Batch, factor: float = 1.0) -> Tensor:
        sequences, example = len(rows["input_ids"]), rows.get("example")
        return row_norms(self.space, lambda: objective.rows(self.space.model, rows)[0] * factor, sequences, example)

    def _check(self, objective: Objective, rows: Batch) -> bool:
        """Whether two rows together give what they give one by one; else say so."""
        expected = torch.stack([self._one(objective, row) for row in split(rows, 1)]).sum(0)
        tolerance = {torch.float64: 1e-7, torch.float32: 1e-3}.get(self.space.blocks[0].dtype, 0.1)
        try:
            found = self._many(objective, rows)
            equal = torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.mean()))
            reason = "their norms differ"
        except NotImplementedError as error:
            equal, reason = False, str(error)
        if not equal:
            log.warning("gradients of rows are taken one by one: %s", reason)
        return equal


class _Tape(TorchFunctionMode):
    """Replaces the functions that use a matrix, and adds up norms as gradients come in."""

    def __init__(self, space: Space, sequences: int, example: Tensor | None) -> None:
        super().__init__()
        self.space, self.sequences, self.example = space, sequences, example
        self.values = torch.zeros(len(space.blocks), dtype=space.compute_dtype, device=space.device)
        self.indices = {id(block.tensor): index for index, block in enumerate(space.blocks)}
        self.left = [0] * len(space.blocks)  # uses whose gradient has not come in yet
        self._sums: dict[int, Tensor] = {}

    def use(self, parameter: Tensor, activation: Tensor) -> int:
        """Announce a use; the activation that the block meets must have sequences as its first axis."""
        index = self.indices[id(parameter)]
        if activation.dim() < 2 or activation.shape[0] != self.sequences:
            raise NotImplementedError(f"{self.space.blocks[index].name!r} is used on something without an axis of sequences")
        self.left[index] += 1
        return index

    def add(self, index: int, gradient: Tensor) -> None:
        """The gradients of one use, ``[sequences, ...]``; after the last use the norm of each row's sum is taken."""
        gradient = gradient.reshape(self.sequences, -1)
        if self.example is not None:
            rows = int(self.example[-1]) + 1
            gradient = gradient.new_zeros(rows, gradient.shape[1]).index_add_(0, self.example, gradient)
        if index in self._sums:
            gradient = gradient + self._sums.pop(index)
        self.left[index] -= 1
        if self.left[index]:
            self._sums[index] = gradient
        else:
            norms = torch.linalg.vector_norm(gradient, dim=1, dtype=kernels.compute_dtype(self.space.blocks[index].dtype))
            self.values[index] += norms.square().sum()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        if func is F.embedding:
            return self._embedding(*args, **(kwargs or {}))
        if func is torch.addmm and id(args[2]) in self.indices:  # GPT-2: flat inputs, transposed weights
            x = args[1].view(self.sequences, -1, args[1].shape[-1])
            return (self._matrix(x, args[2], transposed=True) + self.vector(args[0], x)).flatten(0, 1)
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = self._matrix(x, weight) if id(weight) in self.indices else F.linear(x, weight)
        return out if bias is None else out + self.vector(bias, out)

    def _matrix(self, x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
        out: Tensor = _Matrix.apply(x, weight, self, self.use(weight, x), transposed)
        return out

    def _embedding(self, ids: Tensor, weight: Tensor, padding_idx: int | None = None, *options: Any, **more: Any) -> Tensor:
        if id(weight) not in self.indices:
            return F.embedding(ids, weight, padding_idx, *options, **more)
        out: Tensor = _Lookup.apply(ids, weight, self, self.use(weight, ids), padding_idx)
        return out

    def vector(self, parameter: Tensor, activation: Tensor) -> Tensor:
        """A vector once for each sequence, shaped to meet that activation."""
        if id(parameter) not in self.indices:
            return parameter
        shape = (self.sequences, *[1] * (activation.dim() - 2), parameter.numel())
        out: Tensor = _Vector.apply(parameter, self, self.use(parameter, activation), shape)
        return out


class _Matrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tape: _Tape, index: int, transposed: bool) -> Tensor:
        ctx.tape, ctx.index, ctx.transposed = tape, index, transposed
        ctx.save_for_backward(x, weight)
        return x @ weight if transposed else F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        inputs, outputs = x.flatten(1, -2), gradient.flatten(1, -2)
        ctx.tape.add(ctx.index, inputs.mT @ outputs if ctx.transposed else outputs.mT @ inputs)
        return gradient @ (weight.t() if ctx.transposed else weight), None, None, None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, tape: _Tape, index: int, padding: int | None) -> Tensor:
        ctx.tape, ctx.index, ctx.shape, ctx.padding = tape, index, weight.shape, padding
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (ids,), (count, width), tape = ctx.saved_tensors, ctx.shape, ctx.tape
        gradient = without_padding(ids, gradient, ctx.padding)
        place = ids.flatten(1) + torch.arange(tape.sequences, device=ids.device)[:, None] * count
        table = gradient.new_zeros(tape.sequences * count, width)
        tape.add(ctx.index, table.index_add_(0, place.flatten(), gradient.reshape(-1, width)))
        return None, None, None, None, None


class _Vector(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, tape: _Tape, index: int, shape: tuple[int, ...]) -> Tensor:
        ctx.tape, ctx.index = tape, index
        return parameter.view(*[1] * (len(shape) - 1), -1).expand(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.tape.add(ctx.index, gradient)
        return None, None, None, None


@contextmanager
def _vectors(space: Space, tape: _Tape) -> Iterator[None]:
    """Give norms their vectors once for each sequence; no parameter that is not a block needs a gradient."""
    frozen = [p for p in space.model.parameters() if p.requires_grad and id(p) not in tape.indices]
    handles: list[Any] = []
    norms = [
        (module, owned)
        for module in space.model.modules()
        if (owned := dict(owned_blocks(module, tape.indices))) and all(space.blocks[index].tensor.dim() == 1 for index in owned.values())
        and not isinstance(module, nn.Linear)
    ]  # fmt: skip

    def expand(owned: dict[str, int], module: nn.Module, arguments: tuple[Any, ...]) -> None:
        for leaf, index in owned.items():
            module._parameters[leaf] = tape.vector(space.blocks[index].tensor, arguments[0])  # type: ignore[assignment]

    def restore(owned: dict[str, int], module: nn.Module, *arguments: Any) -> None:
        for leaf, index in owned.items():
            module._parameters[leaf] = space.blocks[index].tensor  # type: ignore[assignment]

    def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
        out = F.layer_norm(x, module.normalized_shape, None, None, module.eps) * module.weight
        return out if module.bias is None else out + module.bias

    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, owned in norms:
            handles.append(module.register_forward_pre_hook(partial(expand, owned)))
            handles.append(module.register_forward_hook(partial(restore, owned), always_call=True))
        with forwards({module: partial(layer_norm, module) for module, _ in norms if type(module) is nn.LayerNorm}):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, owned in norms:
            restore(owned, module)
        for parameter in frozen:
            parameter.requires_grad_(True)
        for block in space.blocks:
            block.tensor.grad = None

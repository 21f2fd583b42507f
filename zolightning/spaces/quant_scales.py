"""The scales of a quantised model; its packed weights never move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.blocks import Block, check_ids
from zolightning.samplers.base import Direction
from zolightning.spaces.base import SetupReport
from zolightning.spaces.hosts import Owner
from zolightning.spaces.interrupts import uninterrupted
from zolightning.spaces.origins import beside
from zolightning.spaces.packed import scales_of
from zolightning.spaces.patterns import matching
from zolightning.spaces.swapping import SwapSpace


class QuantScaleSpace(SwapSpace):
    r"""The float32 scales of bitsandbytes' packed weights: of 64 weights each in 4 bits, of an output row in 8 bits.

    A weight is :math:`w = s\, q` with a stored number ``q`` that stays. A probe computes with :math:`s \pm \epsilon \sigma z`; an update
    keeps the scales at zero or above, :math:`s \leftarrow \max(s + \Delta, 0)`, as in QZO. QZO also clips the derivative:
    :class:`~zolightning.TwoPoint` with ``clip``.

    Scales that are quantised themselves (double quantisation) become float32 when the space is made: 3 bytes more for 64 weights.

    Args:
        model: A network with linear maps of bitsandbytes, in evaluation mode.
        include: Shell patterns over the names of linear maps; only matching ones move. Empty: all.
        exclude: Shell patterns; matching ones do not move.

    Raises:
        ValueError: The model is not quantised, nothing is left to move, or a pattern matches nothing.

    Example:
        >>> space = QuantScaleSpace(load_model("demo", quantization="nf4"))  # doctest: +SKIP
        >>> optimizer = ZOOptimizer(space, None, TwoPoint(clip=100.0), lr=1e-7)  # doctest: +SKIP

    References:
        Shang et al., "Fine-tuning Quantized Neural Networks with Zeroth-order Optimization", 2025 (QZO).
    """

    def __init__(self, model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        holders = {path: (module, *found) for path, module in model.named_modules() if (found := scales_of(module)) is not None}
        if not holders:
            raise ValueError("a QuantScaleSpace needs a quantised model: set quantization to nf4, fp4 or int8")
        chosen = {path: holders[path] for path in matching(list(holders), "quantised module", include, exclude)}
        if not chosen:
            raise ValueError(f"nothing to move: {len(holders)} quantised modules, include={list(include)}, exclude={list(exclude)}")
        blocks, owners = [], []
        for index, (path, (module, holder, leaf)) in enumerate(chosen.items()):
            if leaf == "absmax":
                _settle(holder)
            # Not bitsandbytes' own names: its int8 layers refuse a checkpoint that has theirs.
            blocks.append(Block(f"{path}.scales", vars(holder)[leaf], beside(model, path, module)))
            owners.append(Owner(index, path, module, leaf, holder))
        check_ids(block.name for block in blocks)
        super().__init__(model, blocks, owners)

    @property
    def pairable(self) -> bool:
        """Never: it would save nothing.

        Every weight depends on a scale, so the signs share no unpacked matrix: 4-bit weights are unpacked twice and multiplied twice,
        in one forward as in two (8-bit ones are multiplied as often). What the signs could share is the noise of the scales, a 64th
        of the weights. Against it stand outputs that have to be put together, and activations of twice the rows.
        """
        return False

    def verify(self, evaluate: Callable[[], Tensor], direction: Direction, eps: float, hold: bool = False) -> SetupReport:
        for owner in self._owners:
            if owner.slots[owner.leaf] is not self.blocks[owner.index].tensor:
                raise ValueError(f"{owner.path!r} was moved to other memory after the space was made; make the space afterwards")
        return super().verify(evaluate, direction, eps, hold)

    def move(self, directions: Sequence[Direction], weights: Tensor, shrink: Tensor | float, valid: Tensor) -> None:
        with uninterrupted():
            super().move(directions, weights, shrink, valid)
            torch._foreach_clamp_min_([block.tensor for block in self.blocks], 0.0)


def _settle(state: Any) -> None:
    """Make the scales one float32 tensor that stays the same object, also when the model goes to another device."""
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        state.absmax = dequantize_blockwise(state.absmax, state.state2).add_(state.offset).float().contiguous()
        state.nested, state.state2, state.offset = False, None, None
    if not hasattr(state, "travels"):
        state.__class__ = _travelling(state.__class__)


@cache
def _travelling(kind: Any) -> type:
    """The class of 4-bit states whose scales move to another device as a parameter does: the tensor stays, its memory changes."""

    def to(self: Any, device: torch.device) -> None:
        scales = self.absmax
        kind.to(self, device)
        scales.data, self.absmax = self.absmax, scales

    return type(kind.__name__, (kind,), {"to": to, "travels": True})

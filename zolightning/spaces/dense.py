"""All weights as they are: each module computes with a perturbed copy of its own parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from zolightning.blocks import Block, check_ids
from zolightning.spaces.hosts import Owner
from zolightning.spaces.origins import origin
from zolightning.spaces.patterns import matching
from zolightning.spaces.swapping import SwapSpace


class DenseSpace(SwapSpace):
    r"""Every floating-point parameter of a network, perturbed out of place.

    While a layer's (or single module's) forward runs, its parameters are replaced by :math:`W \pm \epsilon \sigma z` in scratch
    memory; afterwards the original tensors are back. The weights are never written, so nothing drifts: after any probe, exception
    or Ctrl-C they are what they were, bit for bit. Tied tensors are one block. Parameters with ``requires_grad=False`` stay frozen.

    Args:
        model: The network, in evaluation mode.
        include: Shell patterns over parameter names; only matching ones move. Empty: all.
        exclude: Shell patterns; matching ones do not move.

    Raises:
        ValueError: No parameter is left, a pattern matches nothing, or two parameters lie in the same memory without being one.

    Example:
        >>> space = DenseSpace(model, exclude=["*embed*"])
        >>> [block.name for block in space.blocks]  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        owners: dict[int, list[tuple[str, str]]] = defaultdict(list)  # id(tensor) -> (module path, leaf name)
        first: dict[int, tuple[str, Tensor]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            path, _, leaf = name.rpartition(".")
            owners[id(parameter)].append((path, leaf))
            first.setdefault(id(parameter), (name, parameter))
        check_ids(name for name, _ in first.values())
        _check_apart(first.values())
        wanted = set(matching([name for name, _ in first.values()], "parameter", include, exclude))
        chosen = [(key, Block(name, t, origin(model, name))) for key, (name, t) in first.items() if name in wanted and _can_move(t)]
        if not chosen:
            frozen = sum(not t.requires_grad for _, t in first.values())
            raise ValueError(
                f"nothing to move: {len(first)} parameters, {frozen} of them frozen, include={list(include)}, exclude={list(exclude)}"
            )
        places = [Owner(i, path, model.get_submodule(path), leaf) for i, (key, _) in enumerate(chosen) for path, leaf in owners[key]]
        super().__init__(model, [block for _, block in chosen], places)


def _can_move(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.requires_grad and parameter.numel() > 0


def _check_apart(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse two parameters over one memory: each would add noise of its own to the other's weights."""
    there = [(str(t.device), t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in named if t.numel() and not t.is_meta]
    for (device, _, end, one), (other_device, start, _, other) in pairwise(sorted(there)):
        if device == other_device and start < end:
            raise ValueError(f"parameters {one!r} and {other!r} lie in the same memory: make them one parameter, or a copy of one of them")

"""All weights as they are: each module computes with a perturbed copy of its own parameters."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor, nn

from zolightning.blocks import Block, check_ids
from zolightning.spaces.hosts import Owner
from zolightning.spaces.origins import origin
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
        ValueError: No parameter is left, or a pattern matches nothing.

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
        for pattern in (*include, *exclude):
            if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in first.values()):
                raise ValueError(f"pattern {pattern!r} matches no parameter; names look like {next(iter(first.values()))[0]!r}")
        chosen = [(key, Block(name, t, origin(model, name))) for key, (name, t) in first.items() if _moves(name, t, include, exclude)]
        if not chosen:
            frozen = sum(not t.requires_grad for _, t in first.values())
            raise ValueError(
                f"nothing to move: {len(first)} parameters, {frozen} of them frozen, include={list(include)}, exclude={list(exclude)}"
            )
        places = [Owner(i, path, model.get_submodule(path), leaf) for i, (key, _) in enumerate(chosen) for path, leaf in owners[key]]
        super().__init__(model, [block for _, block in chosen], places)


def _moves(name: str, parameter: Tensor, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if not (parameter.is_floating_point() and parameter.requires_grad and parameter.numel()):
        return False
    if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return False
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)

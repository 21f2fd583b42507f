"""All weights as they are: each module computes with a perturbed copy of its own parameters."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zolightning import kernels
from zolightning.blocks import Block, check_ids
from zolightning.samplers.base import Direction
from zolightning.spaces.base import SetupReport, Space
from zolightning.spaces.interrupts import uninterrupted
from zolightning.spaces.resolution import resolvable_eps
from zolightning.spaces.watch import ProbeWatch

_SAMPLE = 1 << 16  # elements of a block that the resolution check looks at


@dataclass(frozen=True)
class _Owner:
    """A place where a block hangs: ``module._parameters[leaf]``; tied weights have several."""

    index: int
    module: nn.Module
    leaf: str


class DenseSpace(Space):
    r"""Every floating-point parameter of a network, perturbed out of place.

    While a module's forward runs, its parameters are replaced by :math:`W \pm \epsilon \sigma z` in scratch memory; afterwards
    the original tensors are back. The weights are never written, so nothing drifts: after any probe, exception or Ctrl-C they
    are what they were, bit for bit. Tied tensors are one block. Parameters with ``requires_grad=False`` stay frozen.

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
        chosen = [(key, Block(name, t)) for key, (name, t) in first.items() if _moves(name, t, include, exclude)]
        if not chosen:
            frozen = sum(not t.requires_grad for _, t in first.values())
            raise ValueError(
                f"nothing to move: {len(first)} parameters, {frozen} of them frozen, include={list(include)}, exclude={list(exclude)}"
            )
        super().__init__(model, [block for _, block in chosen])
        self._hosts: dict[str, list[_Owner]] = defaultdict(list)  # path of the module whose forward swaps -> the owners it swaps
        for index, (key, _) in enumerate(chosen):
            for path, leaf in owners[key]:
                self._hosts[path].append(_Owner(index, model.get_submodule(path), leaf))
        self._host_modules = {path: model.get_submodule(path) for path in self._hosts}
        self._handles: list[RemovableHandle] = []
        self._watch: ProbeWatch | None = None

    @contextmanager
    def probe(self, direction: Direction, distance: float, hold: bool = False) -> Iterator[None]:
        amounts = (direction.scales.to(self.compute_dtype) * distance).unbind()
        self.restore()  # nothing to do, unless interrupts came so fast that the last probe could not
        handles = self._handles
        try:
            if hold:
                self._swap([owner for owners in self._hosts.values() for owner in owners], direction, amounts)
                yield
                return
            with uninterrupted():  # between a hook and its handle an interrupt would leave the hook for good
                for path, owners in self._hosts.items():
                    host = self._host_modules[path]
                    handles.append(host.register_forward_pre_hook(partial(self._swap, owners, direction, amounts)))
                    handles.append(host.register_forward_hook(partial(self._restore, owners), always_call=True))
            yield
        finally:
            try:
                with uninterrupted():
                    self.restore()
            except BaseException:  # an interrupt before the signals were held: finish first
                self.restore()
                raise

    def restore(self) -> None:
        """Take all hooks away and put the weights back into their modules; harmless where there is nothing to do."""
        while self._handles:
            self._handles.pop().remove()
        for owners in self._hosts.values():
            self._restore(owners)

    def _swap(self, owners: list[_Owner], direction: Direction, amounts: Sequence[Tensor], *hook_arguments: Any) -> None:
        with self._watch.paused() if self._watch else nullcontext():
            fresh: dict[int, Tensor] = {}  # a block tied inside one host is drawn once
            for owner in owners:
                block = self.blocks[owner.index]
                if owner.index not in fresh:
                    amount = amounts[owner.index].to(block.tensor.device, kernels.compute_dtype(block.dtype))
                    fresh[owner.index] = kernels.materialise(block.tensor, amount, direction.noise(block))
                owner.module._parameters[owner.leaf] = fresh[owner.index]  # type: ignore[assignment]
                if self._watch:
                    self._watch.expect(block.name, fresh[owner.index])

    def _restore(self, owners: list[_Owner], *hook_arguments: Any) -> None:
        for owner in owners:
            parameters = owner.module._parameters
            scratch, parameters[owner.leaf] = parameters[owner.leaf], self.blocks[owner.index].tensor  # type: ignore[assignment]
            if self._watch and scratch is not None:
                self._watch.forget(scratch)

    def verify(self, evaluate: Callable[[], Tensor], direction: Direction, eps: float, hold: bool = False) -> SetupReport:
        report = self._check_resolution(direction, eps)
        leaked = self._watched_probe(evaluate, direction, eps, hold, report)
        if leaked:
            self._lift(leaked)
            report.lifted = sorted(leaked)
            leaked = self._watched_probe(evaluate, direction, eps, hold, report)
        if leaked:
            names = ", ".join(repr(name) for name in sorted(leaked))
            raise ValueError(
                f"{names}: read outside the forward of its module and of the module's parent, so a probe would miss it; exclude it"
            )
        return report

    def _watched_probe(self, evaluate: Callable[[], Tensor], direction: Direction, eps: float, hold: bool, report: SetupReport) -> set[str]:
        """One probe under the watch; returns the blocks that leaked."""
        self._watch = ProbeWatch(self.model, self.blocks)
        try:
            with self._watch as watch, self.probe(direction, eps, hold):
                report.loss = float(evaluate())
        finally:
            self._watch = None
        if watch.dropout:
            raise ValueError("the model draws dropout masks, so two probes of one direction would differ; call model.eval()")
        report.unread = [block.name for block in self.blocks if block.name not in watch.read]
        return watch.leaked

    def _lift(self, leaked: set[str]) -> None:
        """Let the parent module swap these blocks: its forward reads them."""
        hosts: dict[str, list[_Owner]] = defaultdict(list)
        for path, owners in self._hosts.items():
            for owner in owners:
                lift = self.blocks[owner.index].name in leaked and path
                hosts[path.rpartition(".")[0] if lift else path].append(owner)
        self._hosts = hosts
        self._host_modules = {path: self.model.get_submodule(path) for path in hosts}

    def _check_resolution(self, direction: Direction, eps: float) -> SetupReport:
        """Compare ``W + eps u`` with ``W`` after rounding, on the first elements of every block."""
        report, changed, total = SetupReport(), 0.0, 0
        amounts = direction.scales.to(self.compute_dtype) * eps
        for index, block in enumerate(self.blocks):
            if direction.scales[index] == 0:
                continue
            sample = block.tensor.view(-1)[:_SAMPLE]
            amount = amounts[index].to(sample.device, kernels.compute_dtype(block.dtype))
            share = float((kernels.materialise(sample, amount, direction.noise(block)) != sample).float().mean())
            changed, total = changed + share * block.numel, total + block.numel
            if share < 0.5:
                report.unresolved.append(block.name)
        report.resolved = changed / max(total, 1)
        if report.resolved < 0.5:
            dtype = str(self.blocks[0].dtype).removeprefix("torch.")
            enough = resolvable_eps(self.blocks, direction.scales)
            raise ValueError(f"eps={eps:g} is below what {dtype} weights of this size resolve (about {enough:.0e})")
        return report


def _moves(name: str, parameter: Tensor, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if not (parameter.is_floating_point() and parameter.requires_grad and parameter.numel()):
        return False
    if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return False
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)

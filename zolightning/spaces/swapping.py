"""The mechanism of out-of-place probes: while a module's forward runs, some of its tensors are others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zolightning import kernels
from zolightning.blocks import Block
from zolightning.samplers.base import Direction, Sampler
from zolightning.spaces.base import SetupReport, Space
from zolightning.spaces.hosts import LAYER_BYTES, Host, Matrix, Owner, View, layer_paths, nbytes, pieces
from zolightning.spaces.interrupts import uninterrupted
from zolightning.spaces.late import LateMove
from zolightning.spaces.lazy import LazyWeight, Source
from zolightning.spaces.paired import pair, pairable, unpair
from zolightning.spaces.resolution import resolvable_eps
from zolightning.spaces.routed import Routed, ghost, lay, routable, route, unroute
from zolightning.spaces.watch import ProbeWatch

_SAMPLE = 1 << 16  # elements of a block that the resolution check looks at


class SwapSpace(Space):
    r"""Blocks that are replaced by :math:`W \pm \epsilon \sigma z` in scratch memory while the module around them computes.

    Afterwards the original tensors are back. They are never written by a probe, so nothing drifts: after any probe, exception or
    Ctrl-C they are what they were, bit for bit.

    Args:
        model: The network, in evaluation mode.
        blocks: What moves.
        owners: The places where the blocks hang; tied blocks have several.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], owners: Sequence[Owner]) -> None:
        super().__init__(model, blocks)
        self._owners = tuple(owners)
        self._raised: dict[str, int] = {}  # blocks that leaked: how many places further up they are swapped
        self._hosts = self._place()
        self._everything = Host("", model, self._owners, self.blocks)
        self._pieces: dict[int, list[kernels.Pack]] = {}
        self._late: LateMove | None = None
        self._walking = False
        self._handles: list[RemovableHandle] = []
        self._watch: ProbeWatch | None = None

    @contextmanager
    def probe(self, direction: Direction, distance: float, hold: bool = False) -> Iterator[None]:
        view = self._view(direction, distance, 1)
        self.restore()  # nothing to do, unless interrupts came so fast that the last probe could not
        try:
            if hold:
                self._swap(self._everything, view, whole=True)
                yield
                return
            with uninterrupted():  # between a hook and its handle an interrupt would leave the hook for good
                self._hook(view)
            yield
        finally:
            try:
                with uninterrupted():
                    self.restore()
            except BaseException:  # an interrupt before the signals were held: finish first
                self.restore()
                raise

    @property
    def pairable(self) -> bool:
        return pairable(owner.module for owner in self._owners)

    @contextmanager
    def pair(self, direction: Direction, distance: float) -> Iterator[None]:
        view = self._view(direction, distance, 2)
        self.restore()
        try:
            with uninterrupted():
                lazy = {id(owner.module) for host in self._hosts for owner in host.owners if self._unmade(host, owner, view)}
                pair(owner.module for owner in self._owners if id(owner.module) not in lazy)
                self._hook(view)
            yield
        finally:
            with uninterrupted():
                self.restore()

    def _view(self, direction: Direction, distance: float, copies: int) -> View:
        amounts, factors = direction.scales.to(self.compute_dtype) * distance, self.factors(direction)
        if not self._walking:
            self.catch_up()
        late = self._late if self._walking else None
        return View(direction, amounts, copies, factors.paths(direction, amounts, copies) if factors is not None else {}, late)

    @contextmanager
    def walk(self, sampler: Sampler, seed: int, step: int) -> Iterator[None]:
        if not self.deferred or self._factors is not None or type(self).move is not SwapSpace.move:  # a move of its own may do more
            self.catch_up()
            yield
            return
        if self._late is None:
            self._late = LateMove(self.blocks, self.compute_dtype)
        self._late.begin(sampler, seed, step)
        try:
            self._walking = True
            yield
        finally:
            self._walking, self._late.waits = False, True

    def catch_up(self) -> None:
        if self._late is not None:
            self._late.catch_up()

    def drop(self) -> None:
        super().drop()
        if self._late is not None:
            self._late.drop()

    def move(self, directions: Sequence[Direction], weights: Tensor, shrink: Tensor | float, valid: Tensor) -> None:
        if self._walking and self._late is not None:
            (direction,) = directions
            self._late.note(direction, weights[:, None] * direction.scales, shrink, valid)
        else:
            self.catch_up()
            super().move(directions, weights, shrink, valid)

    @property
    def layers(self) -> list[nn.Module]:
        """The repeated layers that are perturbed around their forward, not inside."""
        paths = set(layer_paths(self.model))
        return [host.module for host in self._hosts if host.path in paths]

    def _moved(self) -> None:
        super()._moved()
        self._hosts, self._everything = self._place(), Host("", self.model, self._owners, self.blocks)
        self._pieces.clear()
        if self._late is not None:
            self._late.moved()
        self._late = None

    def restore(self) -> None:
        """Take all hooks away and put the weights back into their modules; harmless where there is nothing to do."""
        while self._handles:
            self._handles.pop().remove()
        self._restore(self._everything)
        unpair(owner.module for owner in self._owners)
        unroute(owner.module for owner in self._owners)

    def scratch(self, copies: int, hold: bool) -> int:
        small = self._factors.indices if self._factors is not None else ()
        if hold:
            return copies * nbytes(block for index, block in enumerate(self.blocks) if index not in small)
        return copies * max(host.scratch(small) for host in self._hosts)

    def _place(self) -> list[Host]:
        """Decide during whose forward each block is swapped: that of its layer, of its module, or of the module's parent."""
        layers = layer_paths(self.model)
        layer_of = {owner.path: next((p for p in layers if f"{owner.path}.".startswith(f"{p}.")), None) for owner in self._owners}
        sizes: dict[str, int] = defaultdict(int)  # of what a layer that is large would have made at once
        for owner in self._owners:
            sizes[layer_of[owner.path] or ""] += 0 if owner.matrix else self.blocks[owner.index].nbytes
        places: dict[str, list[Owner]] = defaultdict(list)
        for owner in self._owners:
            layer, parent = layer_of[owner.path], owner.path.rpartition(".")[0] if owner.path else ""
            own = [layer, owner.path, parent] if layer is not None and sizes[layer] <= LAYER_BYTES else [owner.path, parent]
            places[own[min(self._raised.get(self.blocks[owner.index].name, 0), len(own) - 1)]].append(owner)
        return [Host(path, self.model.get_submodule(path), owners, self.blocks) for path, owners in places.items()]

    def _hook(self, view: View) -> None:
        layers = {id(layer) for layer in self.layers} if self.compiled else ()
        for host in self._hosts:
            opaque = [
                owner for owner in host.owners if id(host.module) in layers and self._unmade(host, owner, view) and routable(owner.module)
            ]
            route(owner.module for owner in opaque)
            swap = partial(self._swap, host, view, opaque=frozenset(owner.index for owner in opaque))
            self._handles.append(host.module.register_forward_pre_hook(swap))
            self._handles.append(host.module.register_forward_hook(partial(self._restore, host), always_call=True))

    @staticmethod
    def _unmade(host: Host, owner: Owner, view: View) -> bool:
        """Whether a block is made where it is read, or computed with by something else."""
        return owner.index in host.lazy or owner.index in view.paths

    def _swap(self, host: Host, view: View, *hook_arguments: Any, whole: bool = False, opaque: Container[int] = ()) -> None:
        with self._unseen():
            fresh = host.materialise(view, whole)
            if view.copies == 1:
                fresh = {index: pair[0] for index, pair in fresh.items()}
            if self._watch:  # tensors that are made together share their memory, and the watch goes by that
                fresh = {index: tensor.clone() for index, tensor in fresh.items()}
            for owner in host.owners:
                if owner.index not in fresh:
                    source, weight = self._source(owner.index, view), self.blocks[owner.index].tensor
                    fresh[owner.index] = ghost(weight, source) if owner.index in opaque else LazyWeight.of(weight, source)
                elif self._watch and not isinstance(fresh[owner.index], LazyWeight):
                    self._watch.expect(self.blocks[owner.index].name, fresh[owner.index])
                owner.slots[owner.leaf] = fresh[owner.index]

    def _source(self, index: int, view: View) -> Source:
        """What computes with a block that is not made."""
        block, source = self.blocks[index], view.paths.get(index)
        if source is None:
            if index not in self._pieces:
                self._pieces[index] = pieces(index, block)
            source = Matrix(index, block, self._pieces[index], view)
        source.reading = partial(self._reading, block.name)
        return source

    def _reading(self, name: str) -> AbstractContextManager[None]:
        if self._watch:
            self._watch.read.add(name)
        return self._unseen()

    def _unseen(self) -> AbstractContextManager[None]:
        """What happens inside is the space's own doing."""
        return self._watch.paused() if self._watch else nullcontext()

    def _restore(self, host: Host, *hook_arguments: Any) -> None:
        for owner in host.owners:
            slots = owner.slots
            scratch, slots[owner.leaf] = slots[owner.leaf], self.blocks[owner.index].tensor
            if self._watch and scratch is not None and not isinstance(scratch, LazyWeight):
                self._watch.forget(scratch)
            if isinstance(owner.module, Routed) and scratch is not None:
                lay(scratch)

    def verify(self, evaluate: Callable[[], Tensor], direction: Direction, eps: float, hold: bool = False) -> SetupReport:
        report = self._check_resolution(direction, eps)
        for _ in range(3):
            leaked = self._watched_probe(evaluate, direction, eps, hold, report)
            if not leaked:
                return report
            for name in leaked:
                self._raised[name] = self._raised.get(name, 0) + 1
            self._hosts = self._place()
            report.lifted = sorted(self._raised)
        names = ", ".join(repr(name) for name in sorted(leaked))
        raise ValueError(
            f"{names}: read outside the forward of its module and of the module's parent, so a probe would miss it; exclude it"
        )

    def _watched_probe(self, evaluate: Callable[[], Tensor], direction: Direction, eps: float, hold: bool, report: SetupReport) -> set[str]:
        """One probe under the watch; returns the blocks that leaked."""
        self._watch = ProbeWatch(self.model, self.blocks)
        try:
            with self._watch as watch, self.probe(direction, eps, hold):
                report.loss = float(evaluate().detach())
        finally:
            self._watch = None
        if watch.dropout:
            raise ValueError("the model draws dropout masks, so two probes of one direction would differ; call model.eval()")
        report.unread = [block.name for block in self.blocks if block.name not in watch.read]
        return watch.leaked

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
        report.resolved = changed / total if total else 1.0
        if report.resolved < 0.5:
            dtype = str(self.blocks[0].dtype).removeprefix("torch.")
            enough = resolvable_eps(self.blocks, direction.scales)
            raise ValueError(f"eps={eps:g} is below what {dtype} weights of this size resolve (about {enough:.0e})")
        return report

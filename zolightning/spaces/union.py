"""Several spaces as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.blocks import check_ids
from zolightning.samplers.base import Direction, Sampler
from zolightning.spaces.base import SetupReport, Space
from zolightning.spaces.factors import Factors
from zolightning.spaces.interrupts import uninterrupted


class UnionSpace(Space):
    """All blocks of several spaces of one model, moved together: scales and norms, adapters and the head, ...

    Args:
        model: The network, in evaluation mode.
        spaces: Make the spaces; called one after another, each with the model as the one before left it (a space may put something
            around it).

    Raises:
        ValueError: There is no space, two spaces move the same tensor, or a space is refused.

    Example:
        >>> space = UnionSpace(model, [QuantScaleSpace, partial(DenseSpace, include=["*norm*"])])  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, spaces: Sequence[Callable[[nn.Module], Space]]) -> None:
        if not spaces:
            raise ValueError("nothing to move: a UnionSpace needs at least one space")
        self.spaces: list[Space] = []
        for make in spaces:
            self.spaces.append(make(self.spaces[-1].model if self.spaces else model))
        blocks = [block for space in self.spaces for block in space.blocks]
        seen: set[int] = set()
        for block in blocks:
            if id(block.tensor) in seen:
                raise ValueError(f"two spaces move {block.name!r}; leave it out of one of them with exclude")
            seen.add(id(block.tensor))
        check_ids(block.name for block in blocks)
        super().__init__(self.spaces[-1].model, blocks)

    def _parts(self, direction: Direction) -> list[tuple[Space, Direction]]:
        """Each space with its own blocks' part of a direction."""
        scales = direction.scales.split([len(space.blocks) for space in self.spaces])
        return [(space, replace(direction, scales=part)) for space, part in zip(self.spaces, scales, strict=True)]

    def prepare(self, sampler: Sampler, seed: int, step: int) -> None:
        for space in self.spaces:
            space.deferred = self.deferred
            space.prepare(sampler, seed, step)

    def settle(self, seed: int, step: int) -> None:
        for space in self.spaces:
            space.settle(seed, step)

    @contextmanager
    def walk(self, sampler: Sampler, seed: int, step: int) -> Iterator[None]:
        with ExitStack() as stack:
            for space in self.spaces if type(self).move is UnionSpace.move else ():  # a move of its own may do more
                stack.enter_context(space.walk(sampler, seed, step))
            yield

    def catch_up(self) -> None:
        for space in self.spaces:
            space.catch_up()

    def drop(self) -> None:
        for space in self.spaces:
            space.drop()

    @property
    def held(self) -> tuple[Factors, ...]:
        return tuple(factors for space in self.spaces for factors in space.held)

    def fusable(self, directions: Sequence[Direction]) -> bool:
        parts = zip(*(self._parts(direction) for direction in directions), strict=True)
        return all(part[0][0].fusable([direction for _, direction in part]) for part in parts)

    @contextmanager
    def probe(self, direction: Direction, distance: float, hold: bool = False) -> Iterator[None]:
        with ExitStack() as stack:
            for space, part in self._parts(direction):
                stack.enter_context(space.probe(part, distance, hold))
            yield

    @property
    def pairable(self) -> bool:
        return all(space.pairable for space in self.spaces)

    @contextmanager
    def pair(self, direction: Direction, distance: float) -> Iterator[None]:
        with ExitStack() as stack:
            for space, part in self._parts(direction):
                stack.enter_context(space.pair(part, distance))
            yield

    @property
    def layers(self) -> list[nn.Module]:
        return list(dict.fromkeys(layer for space in self.spaces for layer in space.layers))

    @property
    def compiled(self) -> bool:
        return any(space.compiled for space in self.spaces)

    @compiled.setter
    def compiled(self, compiled: bool) -> None:
        for space in self.spaces:
            space.compiled = compiled

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for space in self.spaces for name, value in space.settings.items()}

    def locate(self) -> None:
        super().locate()
        for space in self.spaces:
            space.locate()

    def active(self, clock: Tensor) -> Tensor | None:
        parts = [space.active(clock) for space in self.spaces]
        if all(part is None for part in parts):
            return None
        every = [torch.ones(len(space.blocks), device=clock.device) for space in self.spaces]
        return torch.cat([own if part is None else part for own, part in zip(every, parts, strict=True)])

    def scratch(self, copies: int, hold: bool) -> int:
        return sum(space.scratch(copies, hold) for space in self.spaces)

    def verify(self, evaluate: Callable[[], Tensor], direction: Direction, eps: float, hold: bool = False) -> SetupReport:
        reports = [space.verify(evaluate, part, eps, hold) for space, part in self._parts(direction)]
        with self.probe(direction, eps, hold):
            loss = float(evaluate())
        names = {kind: [name for report in reports for name in getattr(report, kind)] for kind in ("unresolved", "unread", "lifted")}
        resolved = sum(report.resolved * space.numel for report, space in zip(reports, self.spaces, strict=True)) / self.numel
        return SetupReport(loss, resolved, **names)

    def move(self, directions: Sequence[Direction], weights: Tensor, shrink: Tensor | float, valid: Tensor) -> None:
        parts = [self._parts(direction) for direction in directions]
        with uninterrupted():
            for index, space in enumerate(self.spaces):
                space.move([part[index][1] for part in parts], weights, shrink, valid)

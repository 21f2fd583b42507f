"""From base weights and a journal to the trained weights, bit for bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from zolightning.blocks import Block
from zolightning.journal.contents import Entry, Journal, whole
from zolightning.journal.settings import Settings, built_in_rule, describe_blocks, fingerprint, sampler_of
from zolightning.optim.rules import Rule
from zolightning.samplers.base import Direction, Sampler
from zolightning.spaces.base import SetupReport, Space


class Moved(Space):
    """Blocks that are moved and never probed."""

    def probe(self, direction: Direction, distance: float, hold: bool = False) -> AbstractContextManager[None]:
        """Not here.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError

    def verify(self, evaluate: Callable[[], Tensor], direction: Direction, eps: float, hold: bool = False) -> SetupReport:
        """Not here.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError


def replay(
    journal: str | Path,
    model: nn.Module | Space,
    until_step: int | None = None,
    *,
    sampler: Sampler | None = None,
    rule: Rule | None = None,
) -> int:
    """Rebuild the trained weights of a run from its base weights and its journal, in place and bit for bit.

    Nothing of the run is needed but these two: no data, no policy file. The device is of no importance.

    Args:
        journal: The file of the run, ``journal.zo``.
        model: The base model, in the run's type of weights; its blocks are moved. For blocks that are no parameters of it (quantisation
            scales, adapters): a space like the run's.
        until_step: Stop after so many steps; ``None``: at the end.
        sampler: For a run with noise of your own class: that sampler. Its scales are not used, those of the journal are.
        rule: For a run with an update rule of your own class: that rule.

    Returns:
        Steps that the weights now stand at.

    Raises:
        ValueError: The journal is damaged, the model is not the one that it begins with, the step is not in it, or it needs a class of
            yours. The weights are then as they were.

    Example:
        >>> zl.replay("runs/sst2/journal.zo", load_model("my-model", "bfloat16"))  # doctest: +SKIP
        2000
    """
    contents = whole(journal)
    space = model if isinstance(model, Space) else Moved(model, blocks_of(contents, model))
    return rebuild(contents, space, until_step, sampler, rule)


def rebuild(contents: Journal, space: Space, until_step: int | None, sampler: Sampler | None, rule: Rule | None) -> int:
    """See :func:`replay`.

    Args:
        contents: The journal.
        space: Its blocks, with the base weights, and how they move.
        until_step: As for :func:`replay`.
        sampler: As for :func:`replay`.
        rule: As for :func:`replay`.
    """
    first, until = contents.first, contents.steps if until_step is None else until_step
    if not first.start <= until <= contents.steps:
        raise ValueError(f"until_step={until} is not in the journal, which holds steps {first.start} to {contents.steps}")
    check_weights(contents, space.blocks)
    entries, known = contents.surviving(until), tools(sampler, rule)
    for entry in entries:
        known(entry.settings)  # refuse before anything moves
    move_all(space, entries, contents.surviving_looks(until), until, known)
    return until


def blocks_of(contents: Journal, model: nn.Module) -> list[Block]:
    """The model's tensors that the journal moves, in its order.

    Raises:
        ValueError: One is missing, or of another type or shape.
    """
    found = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    blocks = []
    for name, dtype, shape in contents.first.blocks:
        if name not in found:
            raise ValueError(f"the journal is of another model: there is no {name[:80]!r} here")
        block = Block(name, found[name])
        here = describe_blocks([block])[0]
        if here != (name, dtype, shape):
            raise ValueError(
                f"the journal is of another model: {name[:80]!r} is {dtype}{list(shape)} there and {here[1]}{list(here[2])} here"
            )
        blocks.append(block)
    return blocks


def check_weights(contents: Journal, blocks: Sequence[Block]) -> None:
    """Make sure that the weights are those that the journal begins with.

    Raises:
        ValueError: They are others.
    """
    first = contents.first
    if describe_blocks(blocks) != first.blocks:
        raise ValueError(f"journal {str(contents.path)!r} is of another model or space")
    if fingerprint(blocks) == first.fingerprint:
        return
    if first.start:
        raise ValueError(
            f"journal {str(contents.path)!r} begins at step {first.start}, with the weights of a checkpoint: load that one first"
        )
    raise ValueError(f"journal {str(contents.path)!r} begins with other weights: those of {first.base[:80]!r}, as they were then")


#: What draws the noise of steps with some settings, and what makes moves of their coefficients.
Tools = Callable[[Settings], tuple[Sampler, Rule]]


def tools(own_sampler: Sampler | None, own_rule: Rule | None) -> Tools:
    """Those that settings name; those of the user where they are of a class of the user's own.

    Raises:
        ValueError: When called: it is such a class, and it was not given.
    """
    samplers: dict[str, Sampler | None] = {}  # one each: a space keeps what belongs to its sampler

    def of(settings: Settings) -> tuple[Sampler, Rule]:
        if settings.noise not in samplers:
            samplers[settings.noise] = sampler_of(settings.noise) or own_sampler
        sampler, rule = samplers[settings.noise], built_in_rule(settings) or own_rule
        if sampler is None:
            raise ValueError(f"the run's noise is of a class of its own ({settings.sampler[:80]}): give sampler=")
        if rule is None:
            raise ValueError(f"the run's update rule is a class of its own ({settings.rule[:80]}): give rule=")
        return sampler, rule

    return of


@torch.no_grad()
def move(space: Space, entry: Entry, sampler: Sampler, rule: Rule) -> None:
    """Repeat the move of one step, by the same passes over the weights as in training."""
    row, settings = entry
    lr, coefficients = (torch.tensor(value, dtype=space.compute_dtype, device=space.device) for value in (row.lr, row.coefficients))
    weights, shrink = rule.move(coefficients, lr)
    space.prepare(sampler, settings.seed, row.step)
    scales = row.scales.to(space.device)
    directions = [Direction(sampler, settings.seed, row.step, query, scales) for query in range(settings.queries)]
    space.move(directions, weights, shrink, torch.tensor(row.valid, device=space.device))


def move_all(space: Space, entries: Sequence[Entry], looks: Sequence[int], until: int, of: Tools) -> None:
    """Repeat the moves of steps.

    Args:
        space: What moves.
        entries: The steps.
        looks: Steps at which somebody looked at the weights, in order.
        until: Where the weights then stand.
        of: What draws noise and makes moves.
    """
    marks, before, seed = deque(looks), space.deferred, 0
    try:
        for entry in entries:
            while marks and marks[0] <= entry.row.step:
                space.settle(seed, marks.popleft())
            seed, space.deferred = entry.settings.seed, bool(entry.settings.deferred)
            move(space, entry, *of(entry.settings))
        space.settle(seed, until)
    finally:
        space.deferred = before

"""From statistics of the blocks to scales, without training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from zolightning.modules.statistics import BlockStatistics, mean_statistics
from zolightning.policies import BlockInfo, LossTable, Normaliser, Policy, Table, controls
from zolightning.policies.shared import check_shape_of_ratio, shared_ratio


class ScaleRule(ABC):
    """Makes a policy of what was measured at several places: tasks, and parts of the way of their training.

    Example:
        >>> class Signal(ScaleRule):  # sigma**2 proportional to G at the first place
        ...     def __call__(self, blocks, places):
        ...         return Table.of(blocks, places[0].gradient.clamp_min(0).sqrt().float())
    """

    #: Losses at which the statistics of a task are kept apart, ascending; none: a task is one place.
    levels: tuple[float, ...] = ()

    @abstractmethod
    def __call__(self, blocks: Sequence[BlockInfo], places: Sequence[BlockStatistics]) -> Policy:
        """The policy.

        Args:
            blocks: What it is for.
            places: Statistics of these blocks, at least one.

        Raises:
            ValueError: The statistics show no signal.
        """

    def blank(self) -> Policy:
        """A policy of the kind that the rule makes, before anything was measured."""
        return Table()


class Ratio(ScaleRule):
    r"""Signal for curvature, :math:`\sigma_i^2 \propto \max(G_i, 0) / F_i`, of the mean over places, each in units of its own curvature.

    Args:
        damping: How much of an average block of its size is added to every ``F_i``.

    Raises:
        ValueError: ``damping`` is negative.
    """

    def __init__(self, damping: float = 0.0) -> None:
        if not (damping >= 0 and math.isfinite(damping)):
            raise ValueError(f"damping={damping} must be finite and not negative")
        self.damping = damping

    def __call__(self, blocks: Sequence[BlockInfo], places: Sequence[BlockStatistics]) -> Table:
        mean = mean_statistics(places, normalise=True)
        return controls.closed_form(blocks, mean.by_name("gradient"), mean.by_name("fisher"), self.damping)


class LargestDecrease(ScaleRule):
    """The scales with the largest expected decrease of one step; blocks of little signal get zero.

    Args:
        alignment: How far the curvature lies along the gradient, above 0, at most 1.

    Raises:
        ValueError: ``alignment`` is out of range.
    """

    def __init__(self, alignment: float = 0.1) -> None:
        if not 0 < alignment <= 1:
            raise ValueError(f"alignment={alignment} must be above 0 and at most 1: at 0 the largest decrease would be infinitely sharp")
        self.alignment = alignment

    def __call__(self, blocks: Sequence[BlockInfo], places: Sequence[BlockStatistics]) -> Table:
        return Table.of(blocks, mean_statistics(places, normalise=True).decrease_scales(self.alignment).float())


class SharedRatio(ScaleRule):
    """The ratio of signal to curvature that all places share, whatever the size of their gradients: :func:`shared_ratio`.

    Args:
        power: 1 makes the squares of the scales as flat as the ratio, larger ones concentrate them.
        borrow: How much the neighbours of a block count.
        width: How far neighbours reach, as a share of the model's depth.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, power: float = 3.0, borrow: float = 1.0, width: float = 0.05) -> None:
        check_shape_of_ratio(power, borrow, width)
        self.power, self.borrow, self.width = power, borrow, width

    def __call__(self, blocks: Sequence[BlockInfo], places: Sequence[BlockStatistics]) -> Table:
        gradient, fisher = (torch.stack([getattr(place, name) for place in places]) for name in ("gradient", "fisher"))
        return shared_ratio(blocks, gradient, fisher, torch.tensor([place.rows for place in places]), self.power, self.borrow, self.width)


class UpperHalf(ScaleRule):
    """The scales of another rule in the upper half of the layers and in norms outside of them; nothing else moves.

    Args:
        rule: That rule, one that makes a table; without it: the ratio.

    Raises:
        ValueError: The rule makes another kind of policy.
    """

    def __init__(self, rule: ScaleRule | None = None) -> None:
        self.rule = _of_tables(rule if rule is not None else Ratio())

    def __call__(self, blocks: Sequence[BlockInfo], places: Sequence[BlockStatistics]) -> Table:
        return Table.of(blocks, _scales(self.rule, blocks, places) * controls.upper_half(blocks).values.detach())


class ByLoss(ScaleRule):
    """One rule while the loss is low, another while it is high: :class:`LossTable`.

    While a model learns the form of an answer, other blocks have signal than when it tells answers apart. The rule for high losses is
    given the places where the loss was high; without one it is not asked, and scales are equal there.

    Args:
        below: For low losses, by all places; makes a table; without it: the ratio in the upper half.
        above: For high losses, by the places above the upper level; makes a table; without it: the squared shared ratio.
        levels: Loss in nats up to which ``below`` counts alone, and from which ``above`` does.

    Raises:
        ValueError: ``levels`` are not two ascending positive numbers, or a rule makes another kind of policy.
    """

    def __init__(self, below: ScaleRule | None = None, above: ScaleRule | None = None, levels: tuple[float, float] = (0.8, 1.2)) -> None:
        if len(levels) != 2:
            raise ValueError(f"levels={list(levels)} must be two")
        self.levels = LossTable(levels).levels
        self.below = _of_tables(below if below is not None else UpperHalf())
        self.above = _of_tables(above if above is not None else SharedRatio(2.0))

    def __call__(self, blocks: Sequence[BlockInfo], places: Sequence[BlockStatistics]) -> LossTable:
        high = [place for place in places if place.loss >= self.levels[1]]
        above = _scales(self.above, blocks, high) if high else torch.ones(len(blocks))
        scales = torch.stack([_scales(self.below, blocks, places), above], dim=1)
        return LossTable.of(blocks, self.levels, scales, mean_statistics(places, normalise=True).fisher)

    def blank(self) -> LossTable:
        return LossTable(self.levels, Normaliser("none"))


def _of_tables(rule: ScaleRule) -> ScaleRule:
    """The rule, if it makes tables."""
    if not isinstance(blank := rule.blank(), Table):
        raise ValueError(f"{type(rule).__name__} makes a {type(blank).__name__}, where a rule that makes a table is needed")
    return rule


def _scales(rule: ScaleRule, blocks: Sequence[BlockInfo], places: Sequence[BlockStatistics]) -> torch.Tensor:
    """Raw scales of a rule that makes a table."""
    table = rule(blocks, places)
    assert isinstance(table, Table)
    return table.values.detach()

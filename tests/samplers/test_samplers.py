"""Every sampler passes the common test; the common test refuses samplers that are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zolightning.blocks import Block
from zolightning.noise import GaussianNoise, Key, Noise, RademacherNoise
from zolightning.samplers import GaussianSampler, LowRankSampler, RademacherSampler, Sampler
from zolightning.testing import check_sampler


class ScaledGaussian(GaussianSampler):
    def scales(self) -> Tensor:
        return torch.linspace(0.5, 2.0, len(self.blocks))


class ScaledRademacher(RademacherSampler):
    def scales(self) -> Tensor:
        return torch.linspace(2.0, 0.0, len(self.blocks))


@pytest.mark.parametrize(
    "sampler",
    [GaussianSampler(), RademacherSampler(), ScaledGaussian(), ScaledRademacher(), LowRankSampler(rank=2, window=1)],
    ids=lambda s: type(s).__name__,
)
def test_common(sampler: Sampler) -> None:
    check_sampler(sampler)


class WrongMoment(GaussianSampler):
    second_moment = 1.4


class Shifted(Sampler):
    """Has a mean."""

    class Draw(RademacherNoise):
        def draw(self, start: int, count: int, device: torch.device) -> Tensor:
            return super().draw(start, count, device) + 0.2

    def noise(self, block: Block, key: Key) -> Noise:
        return self.Draw(key)


class SharedNoise(Sampler):
    """Gives every block the same noise."""

    def noise(self, block: Block, key: Key) -> Noise:
        return GaussianNoise(Key(key.seed, 0, key.step, key.query))


class GlobalState(Sampler):
    """Draws from torch's own generator."""

    class Draw(Noise):
        def draw(self, start: int, count: int, device: torch.device) -> Tensor:
            return torch.randn(count)

    def noise(self, block: Block, key: Key) -> Noise:
        return self.Draw(key)


class ByChunk(Sampler):
    """Counts elements from the start of the piece."""

    class Draw(GaussianNoise):
        def draw(self, start: int, count: int, device: torch.device) -> Tensor:
            return super().draw(0, count, device)

    def noise(self, block: Block, key: Key) -> Noise:
        return self.Draw(key)


class ForgetsQuery(Sampler):
    def noise(self, block: Block, key: Key) -> Noise:
        return GaussianNoise(Key(key.seed, key.block, key.step))


class ShortScales(GaussianSampler):
    def scales(self) -> Tensor:
        return torch.ones(1)


@pytest.mark.parametrize(
    ("sampler", "complaint"),
    [
        (WrongMoment(), "declared as 1.4 I"),
        (Shifted(), "the mean of z"),
        (SharedNoise(), "two blocks got the same noise"),
        (GlobalState(), "global random state"),
        (ByChunk(), "drawn alone differ"),
        (ForgetsQuery(), "another query gave the same noise"),
        (ShortScales(), r"scales\(\) has shape"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Sampler) else "",
)
def test_common_test_finds_mistakes(sampler: Sampler, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_sampler(sampler)


def test_directions_share_scales_and_hold_no_noise() -> None:
    """A direction is a name: keys and scales."""
    sampler = ScaledGaussian()
    blocks = [Block("a", torch.zeros(3)), Block("b", torch.zeros(4))]

    class Space:
        pass

    space = Space()
    space.blocks = blocks  # type: ignore[attr-defined]
    sampler.bind(space)  # type: ignore[arg-type]
    directions = sampler.directions(seed=9, step=4, queries=3)
    assert [d.query for d in directions] == [0, 1, 2]
    assert all(d.scales is directions[0].scales for d in directions)
    assert directions[2].key(blocks[1]) == Key(9, blocks[1].id, 4, 2)

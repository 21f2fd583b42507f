"""The noise contract: published answers, pinned bits, independence and moments."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import reference
import torch

from zolightning.blocks import Block, check_ids
from zolightning.noise import GaussianNoise, Key, Noise, Purpose, RademacherNoise, block_id, box_muller, philox, rounding_bits

CPU = torch.device("cpu")
KEY = Key(seed=7, block=block_id("model.embed_tokens.weight"), step=3, query=2)
KINDS: tuple[type[Noise], ...] = (GaussianNoise, RademacherNoise)
ALL_ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    """The vectors of Random123."""
    words = philox(key[0] | key[1] << 32, (torch.tensor([counter[0]]), *counter[1:]))
    assert tuple(int(word) for word in words) == expected
    assert tuple(int(word[0]) for word in reference.philox(key[0] | key[1] << 32, np.array([counter[0]]), *counter[1:])) == expected


@pytest.mark.parametrize(
    ("kind", "checksum", "head"),
    [
        (GaussianNoise, "5266444b6ef4104f", [-0.3278850018978119, -0.2515433430671692, 0.18198849260807037, 0.2773049473762512]),
        (RademacherNoise, "2c347e6488f935f7", [-1.0, 1.0, 1.0, -1.0]),
    ],
)
def test_pinned_bits(kind: type[Noise], checksum: str, head: list[float]) -> None:
    """These bits may never change: journals and replays depend on them."""
    values = kind(KEY).draw(0, 10_000, CPU)
    assert values.dtype == torch.float32
    assert hashlib.blake2s(values.numpy().tobytes(), digest_size=8).hexdigest() == checksum
    assert values[:4].tolist() == head


def test_pinned_rounding_bits() -> None:
    """The rounding numbers may never change either."""
    values = rounding_bits(KEY, 0, 10_000, CPU)
    assert hashlib.blake2s(values.numpy().tobytes(), digest_size=8).hexdigest() == "139078877374b238"


@pytest.mark.parametrize("seed", [0, 7, 1 << 31, (1 << 64) - 1])
@pytest.mark.parametrize("step", [0, 5, (1 << 32) - 1])
def test_same_bits_as_the_reference(seed: int, step: int) -> None:
    """An implementation in numpy, written from the description, gives the same bits."""
    name, count = "b.weight", 1001
    assert block_id(name) >> 31 == 1, "a name whose id has the top bit set is the harder case"
    key = Key(seed, block_id(name), step, query=3)
    assert np.array_equal(GaussianNoise(key).draw(0, count, CPU).numpy(), reference.gaussian(seed, name, step, 3, count))
    assert np.array_equal(RademacherNoise(key).draw(0, count, CPU).numpy(), reference.rademacher(seed, name, step, 3, count))
    assert np.array_equal(rounding_bits(key, 0, count, CPU).numpy(), reference.rounding(seed, name, step, 3, count))


def test_box_muller_against_float64() -> None:
    """The polynomials are as exact as float32 allows, also at both ends and at the edges of the quadrants."""
    edges = torch.tensor([0, 1, 2, 255, 1 << 29, (1 << 29) - 1, 1 << 30, 1 << 31, (3 << 30) - 1, (1 << 32) - 129, (1 << 32) - 1])
    words = torch.cat([edges, torch.randint(0, 1 << 32, (200_000,))])
    a, b = torch.cat([words, edges.repeat_interleave(len(edges))]), torch.cat([words.flip(0), edges.repeat(len(edges))])
    cos, sin = box_muller(a, b)
    u = ((a.to(torch.float32) + 0.5) * 2.0**-32).double()
    radius, angle = torch.sqrt(-2 * torch.log(u)), b.double() * (2 * math.pi / 2**32)
    for value, exact in ((cos, radius * torch.cos(angle)), (sin, radius * torch.sin(angle))):
        assert bool(torch.isfinite(value).all())
        assert float((value.double() - exact).abs().max()) < 1e-6
        assert float(((value.double() - exact).abs() / radius.clamp_min(1e-4)).max()) < 3e-7


@pytest.mark.parametrize("kind", KINDS)
def test_any_piece_equals_the_whole(kind: type[Noise]) -> None:
    """Elements do not depend on where a piece starts or ends."""
    whole = kind(KEY).draw(0, 700, CPU)
    for start, count in [(0, 1), (1, 1), (3, 5), (127, 2), (128, 128), (129, 300), (699, 1)]:
        assert torch.equal(kind(KEY).draw(start, count, CPU), whole[start : start + count])
        assert torch.equal(rounding_bits(KEY, start, count, CPU), rounding_bits(KEY, 0, 700, CPU)[start : start + count])


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_tile_the_tensor(kind: type[Noise]) -> None:
    """Walking in chunks gives the same elements once each."""
    numel = (1 << 17) + 77
    parts = list(kind(KEY).chunks(numel, CPU))
    assert len(parts) > 1
    assert [start for start, _, _ in parts] == [0, *(stop for _, stop, _ in parts[:-1])]
    assert torch.equal(torch.cat([z for _, _, z in parts]), kind(KEY).draw(0, numel, CPU))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "other",
    [
        Key(8, KEY.block, 3, 2),
        Key(7 + (1 << 32), KEY.block, 3, 2),
        Key(7 + (1 << 63), KEY.block, 3, 2),
        Key(7, KEY.block ^ 1, 3, 2),
        Key(7, KEY.block ^ (1 << 31), 3, 2),
        Key(7, KEY.block, 4, 2),
        Key(7, KEY.block, 3, 1),
    ],
)
def test_streams_differ(kind: type[Noise], other: Key) -> None:
    """Seed, block, step and query each give an uncorrelated stream."""
    n = 1 << 16
    a, b = kind(KEY).draw(0, n, CPU), kind(other).draw(0, n, CPU)
    assert abs(float((a * b).mean())) < 5 / math.sqrt(n)
    for shift in (1, 4, 128):
        assert not torch.equal(a[shift:], b[:-shift])


def test_purposes_differ() -> None:
    """Rounding numbers share nothing with the direction of any query."""
    groups = torch.arange(64)
    streams = {purpose: philox(7, (groups, 1, 2, 16 * 3 + int(purpose))) for purpose in Purpose}
    assert not torch.equal(streams[Purpose.DIRECTION][0], streams[Purpose.ROUNDING][0])
    assert max(Purpose) < 16


def test_moments_and_tails() -> None:
    """Mean, variance, third and fourth moment, tails and neighbours of the Gaussian, to 4.5 standard errors."""
    n = 4_000_000
    z = torch.cat([part for _, _, part in GaussianNoise(KEY).chunks(n, CPU)]).double()
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        assert abs(float((z**power).mean()) - mean) < 4.5 * math.sqrt(variance / n), power
    for edge in (1.0, 2.0, 3.0, 4.0, 4.5):
        p = math.erfc(edge / math.sqrt(2))
        assert abs(float((z.abs() > edge).double().mean()) - p) < 4.5 * math.sqrt(p * (1 - p) / n), edge
    for shift in (1, 2, 3, 4):
        assert abs(float((z[shift:] * z[:-shift]).mean())) < 4.5 / math.sqrt(n)
        assert abs(float(((z[shift:] ** 2 - 1) * (z[:-shift] ** 2 - 1)).mean())) < 4.5 * 2 / math.sqrt(n)


def test_random_signs_are_fair() -> None:
    """Every bit position of the Rademacher words is fair, and neighbours are independent."""
    n = 128 * 8192
    z = RademacherNoise(KEY).draw(0, n, CPU)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert float(z.view(-1, 128).mean(0).abs().max()) < 5 / math.sqrt(n / 128)
    assert abs(float((z[1:] * z[:-1]).mean())) < 4.5 / math.sqrt(n)


def test_rounding_bits_are_uniform() -> None:
    """All 16 bits are fair."""
    n = 1 << 18
    values = rounding_bits(KEY, 0, n, CPU)
    assert int(values.min()) >= 0
    assert int(values.max()) < 1 << 16
    for bit in range(16):
        assert abs(float(((values >> bit) & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("kind", KINDS)
def test_global_random_state_and_threads(kind: type[Noise]) -> None:
    """Drawing leaves the global random state alone and does not depend on it, nor on the number of threads."""
    before = torch.get_rng_state()
    one = kind(KEY).draw(0, 300_000, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.equal(kind(KEY).draw(0, 300_000, CPU), one)
    finally:
        torch.set_num_threads(threads)


def test_block_ids() -> None:
    """Ids are 32-bit, pinned, and follow the name alone."""
    assert block_id("model.embed_tokens.weight") == 3009005979
    assert block_id("b.weight") == reference.block_number("b.weight") == Block("b.weight", torch.zeros(2)).id


def test_colliding_names_are_refused() -> None:
    """Two names with one id would share their noise."""
    seen: dict[int, str] = {}
    for number in range(400_000):
        other = seen.setdefault(block_id(f"p{number}"), f"p{number}")
        if other != f"p{number}":
            break
    else:
        raise AssertionError("no collision among 400,000 names")
    with pytest.raises(ValueError, match=r"would draw the same noise \(equal 32-bit ids\); rename one of them"):
        check_ids([other, "fine", f"p{number}"])
    check_ids(["fine", "good"])

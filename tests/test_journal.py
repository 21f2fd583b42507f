"""The journal: what is written is read, what is damaged is refused, and base plus journal are the trained weights."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, net_closure, state_bits
from torch import nn

import zolightning as zl
from benchmarks import fuzz
from zolightning.estimators import TwoPoint
from zolightning.journal import Back, Recorder, fingerprint, read
from zolightning.journal.contents import whole
from zolightning.journal.file import MAGIC, START, Appender, pack, pack_rows
from zolightning.noise import GaussianNoise
from zolightning.optim import SGD, Move, Rule, ZOOptimizer
from zolightning.optim.history import Row
from zolightning.policies import FeaturePolicy, PertNN
from zolightning.samplers import GaussianSampler, LowRankSampler, PolicySampler, RademacherSampler, Sampler
from zolightning.spaces import DenseSpace

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAMPLERS: dict[str, Any] = {
    "gaussian": GaussianSampler,
    "rademacher": RademacherSampler,
    "low_rank": lambda: LowRankSampler(2, 5),
    "paper": lambda: PolicySampler(PertNN(), refresh_every=3),
    "policy": lambda: PolicySampler(FeaturePolicy(hidden=4), RademacherSampler()),
}


def make(path: Path, sampler: Sampler | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[ZOOptimizer, Recorder]:
    """A small run, and what keeps its journal."""
    estimator = TwoPoint(options.pop("queries", 2))
    options = {"lr": 0.02, "eps": 0.1, "seed": (1 << 63) + 5, "rule": SGD(weight_decay=0.01), **options}
    optimizer = ZOOptimizer(DenseSpace(Net(dtype).eval()), sampler or GaussianSampler(), estimator, **options)
    return optimizer, Recorder(path, optimizer, "net")


def run(optimizer: ZOOptimizer, recorder: Recorder | None, first: int, last: int, every: int = 4) -> None:
    """Steps with a changing rate; number 3 is not finite."""
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        closure = net_closure(optimizer.space.model, step)
        optimizer.step(lambda closure=closure, step=step: closure() * (math.nan if step == 3 else 1.0))
        if recorder is not None and optimizer.steps % every == 0:
            recorder.drain()


def journal_of(folder: Path, steps: int = 12, **options: Any) -> tuple[Path, ZOOptimizer]:
    """A finished run."""
    path = folder / "journal.zo"
    optimizer, recorder = make(path, **options)
    run(optimizer, recorder, 0, steps)
    recorder.drain()
    recorder.close()
    return path, optimizer


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_base_and_journal_are_the_trained_weights(dtype: torch.dtype, kind: str, queries: int, tmp_path: Path) -> None:
    """With a skipped step and a learning rate that changes; also half of the way."""
    path = tmp_path / "journal.zo"
    optimizer, recorder = make(path, SAMPLERS[kind](), dtype, queries=queries)
    run(optimizer, recorder, 0, 6)
    half = state_bits(optimizer.space.model)
    run(optimizer, recorder, 6, 11)
    recorder.drain()
    model = Net(dtype)
    assert zl.replay(path, model) == 11
    assert state_bits(model) == state_bits(optimizer.space.model) != half
    model = Net(dtype)
    assert zl.replay(path, DenseSpace(model), until_step=6) == 6
    assert state_bits(model) == half != state_bits(Net(dtype))
    model = Net(dtype)
    assert zl.replay(path, model, until_step=0) == 0
    assert state_bits(model) == state_bits(Net(dtype))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, optimizer = journal_of(tmp_path, 10)
    journal = read(path)
    assert (journal.steps, journal.forwards, journal.torn) == (10, optimizer.forwards, 0)
    settings = journal.first
    assert (settings.base, settings.seed, settings.sampler, settings.noise) == ("net", (1 << 63) + 5, "GaussianSampler", "gaussian")
    assert (settings.rule, settings.weight_decay, settings.queries, settings.probes, settings.start) == ("SGD", 0.01, 2, 4, 0)
    assert settings.blocks[0] == ("scale", "float32", (3,))
    assert settings.fingerprint == fingerprint(DenseSpace(Net()).blocks) != fingerprint(optimizer.space.blocks)
    assert [entry.row.valid for entry in journal.entries] == [step != 3 for step in range(10)]


def test_size(tmp_path: Path) -> None:
    """20,000 uniform steps of one direction, with 300 blocks and a write every 10 steps, are under 1 MB."""
    model = nn.ParameterDict(
        {f"model.layers.{i}.self_attn.q_proj.weight".replace(".", "_"): nn.Parameter(torch.ones(1)) for i in range(300)}
    )
    optimizer = ZOOptimizer(DenseSpace(model), lr=1e-3)
    recorder = Recorder(tmp_path / "journal.zo", optimizer, "many")
    for step in range(0, 20_000, 10):
        optimizer.param_groups[0]["forwards"] = 2 * (step + 10)
        recorder._take([Row(step + i, True, 1e-3, (0.5 + i,), (1.0, 2.0), torch.ones(300)) for i in range(10)])
    assert read(tmp_path / "journal.zo").steps == 20_000
    assert (tmp_path / "journal.zo").stat().st_size < 500_000


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_bits_survive(precision: str, tmp_path: Path) -> None:
    """Denormals, signed zeros, the largest numbers; scales that change in their last bit."""
    dtype = getattr(torch, precision)
    tiny, largest = torch.finfo(dtype).smallest_normal / 8, torch.finfo(dtype).max
    optimizer, recorder = make(tmp_path / "journal.zo", dtype=dtype, queries=1)
    optimizer.param_groups[0]["forwards"] = 8
    scales = [torch.ones(7), torch.ones(7), torch.nextafter(torch.ones(7), torch.zeros(7)), torch.ones(7)]
    rows = [
        Row(i, True, tiny, (value,), (largest, -0.0), s)
        for i, (value, s) in enumerate(zip((-0.0, tiny, largest, 0.1), scales, strict=True))
    ]
    rows[3] = rows[3]._replace(coefficients=(float(torch.tensor(0.1, dtype=dtype)),))
    recorder._take(rows)
    for entry, row in zip(read(tmp_path / "journal.zo").entries, rows, strict=True):
        assert struct.pack("<4d", entry.row.lr, *entry.row.coefficients, *entry.row.losses) == struct.pack(
            "<4d", row.lr, *row.coefficients, *row.losses
        )
        assert torch.equal(entry.row.scales, row.scales)


class TestTorn:
    def test_every_length(self, tmp_path: Path) -> None:
        """Cut anywhere, the whole frames before remain; zeros behind them, as a power cut leaves them, are left out too."""
        path, _ = journal_of(tmp_path, 8)
        data, truth = path.read_bytes(), read(path)
        seen = set()
        for size in range(len(MAGIC), len(data)):
            for tail in (b"", bytes(50)):
                path.write_bytes(data[:size] + tail)
                journal = read(path)
                steps = [str(entry.row[:5]) for entry in journal.entries]  # as text, a nan equals itself
                assert steps == [str(entry.row[:5]) for entry in truth.entries[: len(steps)]]
                assert journal.torn == size + len(tail) - journal.end.offset
                seen.add(len(steps))
        assert seen == {0, 4}

    def test_is_cut_off_before_more_is_written(self, tmp_path: Path) -> None:
        path, optimizer = journal_of(tmp_path, 8)
        path.write_bytes(path.read_bytes()[:-3])
        journal = read(path)
        assert (journal.steps, journal.torn > 0) == (4, True)
        again, _ = make(tmp_path / "other.zo")
        again.repeat(entry.row for entry in journal.entries)
        run(again, None, 0, 4)
        recorder = Recorder(path, again, earlier=journal)
        run(again, recorder, 4, 12)
        assert (read(path).steps, read(path).torn) == (12, 0)
        model = Net()
        zl.replay(path, model)
        assert state_bits(model) == state_bits(again.space.model)
        run(optimizer, None, 8, 12)
        assert state_bits(model) == state_bits(optimizer.space.model)

    @pytest.mark.parametrize("keep", [0, 3, 4, 6, 11])
    def test_cut_at_a_step(self, keep: int, tmp_path: Path) -> None:
        """Also between two writes; the steps behind are replaced by those of another learning rate."""
        path, _ = journal_of(tmp_path, 11)
        journal = read(path)
        again, _ = make(tmp_path / "other.zo")
        again.repeat(entry.row for entry in journal.entries[:keep])
        run(again, None, 0, keep)
        recorder = Recorder(path, again, earlier=journal, keep=keep)
        assert len(recorder.losses) == keep
        for step in range(keep, 13):
            again.param_groups[0]["lr"] = 0.5
            again.step(net_closure(again.space.model, step))
        recorder.drain()
        assert read(path).steps == 13
        assert str([entry.row[:5] for entry in read(path).entries[:keep]]) == str([entry.row[:5] for entry in journal.entries[:keep]])
        model = Net()
        zl.replay(path, model)
        assert state_bits(model) == state_bits(again.space.model)


class TestDamage:
    def test_in_the_middle(self, tmp_path: Path) -> None:
        path, _ = journal_of(tmp_path, 12)
        data = bytearray(path.read_bytes())
        data[len(data) // 2 + 300] ^= 1
        path.write_bytes(data)
        before = state_bits(Net())
        model = Net()
        with pytest.raises(ValueError, match=r"^journal '.*journal.zo': it is damaged at byte [\d,]+, after [048] whole steps$"):
            zl.replay(path, model)
        assert state_bits(model) == before

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "holds no whole record"),
            (bytes(3000), "holds no whole record"),
            (MAGIC[:3], "holds no whole record"),
            (b"ZOJOURN2", "it is no journal"),
            (b"PK\x03\x04 zip", "it is no journal"),
            (MAGIC, "holds no whole record"),
        ],
    )
    def test_no_journal(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "journal.zo").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            zl.replay(tmp_path / "journal.zo", Net())

    def test_none_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="does not exist"):
            zl.replay(tmp_path / "journal.zo", Net())

    def test_frames_lost_repeated_exchanged(self, tmp_path: Path) -> None:
        """Each frame is whole; their order is not that in which they were written."""
        path, _ = journal_of(tmp_path, 16)
        data = path.read_bytes()
        ends = sorted(place.offset for place in read(path)._known)
        parts = [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True) if a < b]
        assert len(parts) == 6  # magic, settings, four times rows
        for order in ([0, 1, 2, 4, 5], [0, 1, 2, 2, 3, 4, 5], [0, 1, 3, 2, 4, 5], [0, 2, 3], [0, 1, 2, 3, 5, 4]):
            path.write_bytes(b"".join(parts[i] for i in order))
            with pytest.raises(ValueError, match="damaged at byte"):
                read(path)

    def test_300_mutations(self, tmp_path: Path) -> None:
        result = fuzz.journals(300, tmp_path, seed=7)
        assert result["wrong"] == result["crashed"] == 0, result
        assert result["refused"] > 100
        assert result["accepted"] > 10, "torn ends are accepted, up to where they are whole"

    def test_300_hostile_ones(self, tmp_path: Path) -> None:
        """The checksums are right, the content is not."""
        result = fuzz.journals(300, tmp_path, seed=8, signed=True)
        assert result["crashed"] == 0, result
        assert result["refused"] > 50

    @pytest.mark.parametrize(
        ("payload", "message"),
        [
            (struct.pack("<IIQ", 4, 1 << 31, 0), "too short"),
            (struct.pack("<IIQ", 4, 0, 0), "too short"),
            (b"", "too short"),
            (struct.pack("<IIQ", 9, 1, 0) + bytes(1 + 28), "step 9 follows on 4 steps"),
            (struct.pack("<IIQ", 4, 1, 0) + b"\xff" + bytes(28 + 28), "does not hold together"),
            (struct.pack("<IIQ", 4, 1, 0) + bytes(1 + 28 + 3), "too long"),
            (struct.pack("<IIQ", 4, 1, 0) + b"\x02" + bytes(28), "does not hold together"),
            (struct.pack("<IIQ", 4, 1, 0) + b"\x02" + bytes(27), "too short"),
        ],
    )
    def test_rows_that_do_not_hold_together(self, payload: bytes, message: str, tmp_path: Path) -> None:
        path, _ = journal_of(tmp_path, 4)
        Appender(path, read(path).end).append((b"R", payload))
        with pytest.raises(ValueError, match=message):
            read(path)

    @pytest.mark.parametrize(
        ("kind", "payload", "message"),
        [
            (b"X", b"", "a frame of kind 88"),
            (b"S", b"{", "not JSON"),
            (b"S", b"[" * 100_000, "not JSON"),
            (b"S", b"{}", "format"),
            (b"S", b'{"format": 1}', "its settings are"),
            (b"B", struct.pack("<IId", 4, 5, 0.5), "goes back to a later step"),
            (b"B", struct.pack("<IId", 3, 1, 0.5), "but stands at 4"),
            (b"B", struct.pack("<IId", 4, 1, math.nan), "goes back"),
        ],
    )
    def test_other_frames(self, kind: bytes, payload: bytes, message: str, tmp_path: Path) -> None:
        path, _ = journal_of(tmp_path, 4)
        Appender(path, read(path).end).append((kind, payload))
        with pytest.raises(ValueError, match=message):
            read(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"form": {"paired": 1, "captured": False, "compiled": False, "device": "cpu"}}, "'form' is none"),
            ({"form": {}}, "'form' is none"),
            ({"queries": 0}, "'queries' is 0, out of range"),
            ({"seed": -1}, "'seed' is -1, out of range"),
            ({"seed": True}, "'seed' is no int"),
            ({"eps": math.inf}, "'eps' is inf, out of range"),
            ({"noise": "cauchy"}, "'cauchy' noise"),
            ({"precision": "int8"}, "'int8' numbers"),
            ({"blocks": []}, "its blocks are none"),
            ({"blocks": [["a", "float32", [-1]]]}, "is no block"),
            ({"blocks": [["a", "int8", [1]]]}, "is no block"),
            ({"blocks": [["a", "float32", [1]]] * 2}, "one is there twice"),
            ({"more": 1}, "its settings are"),
        ],
    )
    def test_settings(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        path, _ = journal_of(tmp_path, 1)
        settings = json.loads(read(path).first.to_bytes()) | change
        Appender(path).append((b"S", json.dumps(settings).encode()))
        with pytest.raises(ValueError, match=message):
            read(path)

    def test_a_length_of_nonsense_allocates_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.zo"
        head = struct.pack("<BI", ord("R"), 0xFFFFFFF0)
        path.write_bytes(MAGIC + head + struct.pack("<I", zlib.crc32(head, START.checksum)) + b"x" * 40)
        with pytest.raises(ValueError, match="damaged"):
            read(path)
        data, _ = pack(b"S", bytes(1000), START.checksum)
        path.write_bytes(MAGIC + data[:500])
        assert not read(path).all_settings


class TestOthers:
    def test_another_model(self, tmp_path: Path) -> None:
        path, _ = journal_of(tmp_path)
        with pytest.raises(ValueError, match="there is no 'scale' here"):
            zl.replay(path, nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"'scale' is float32\[3\] there and bfloat16\[3\] here"):
            zl.replay(path, Net(torch.bfloat16))

    @pytest.mark.parametrize("index", [0, 34])
    def test_other_weights(self, index: int, tmp_path: Path) -> None:
        """One bit of one element."""
        path, _ = journal_of(tmp_path)
        model = Net()
        model.first.weight.data.view(-1)[index].view(torch.int32).bitwise_xor_(1)
        with pytest.raises(ValueError, match="begins with other weights: those of 'net'"):
            zl.replay(path, model)

    @pytest.mark.parametrize("step", [-1, 13])
    def test_steps_that_are_not_there(self, step: int, tmp_path: Path) -> None:
        path, _ = journal_of(tmp_path)
        with pytest.raises(ValueError, match=f"until_step={step} is not in the journal, which holds steps 0 to 12"):
            zl.replay(path, Net(), until_step=step)

    def test_a_journal_that_begins_later(self, tmp_path: Path) -> None:
        """The weights of that step are needed, and suffice."""
        first, _ = make(tmp_path / "other.zo")
        run(first, None, 0, 5)
        middle = {name: tensor.clone() for name, tensor in first.space.model.state_dict().items()}
        recorder = Recorder(tmp_path / "journal.zo", first)
        run(first, recorder, 5, 9)
        recorder.drain()
        with pytest.raises(ValueError, match="begins at step 5, with the weights of a checkpoint: load that one first"):
            zl.replay(tmp_path / "journal.zo", Net())
        model = Net()
        model.load_state_dict(middle)
        assert zl.replay(tmp_path / "journal.zo", model) == 9
        assert state_bits(model) == state_bits(first.space.model)

    def test_classes_of_ones_own(self, tmp_path: Path) -> None:
        class Halved(GaussianNoise):
            def draw(self, start: int, count: int, device: torch.device) -> torch.Tensor:
                return super().draw(start, count, device) / 2

        class HalvedSampler(Sampler):
            def noise(self, block: Any, key: Any) -> Halved:
                return Halved(key)

        class Signs(Rule):
            def move(self, coefficients: torch.Tensor, lr: torch.Tensor) -> Move:
                return Move(-lr * coefficients.sign(), lr * 0)

        path, optimizer = journal_of(tmp_path, sampler=HalvedSampler(), rule=Signs())
        with pytest.raises(ValueError, match=r"noise is of a class of its own \(HalvedSampler\): give sampler="):
            zl.replay(path, Net())
        with pytest.raises(ValueError, match=r"update rule is a class of its own \(Signs\): give rule="):
            zl.replay(path, Net(), sampler=HalvedSampler())
        model = Net()
        zl.replay(path, model, sampler=HalvedSampler(), rule=Signs())
        assert state_bits(model) == state_bits(optimizer.space.model)


def test_back(tmp_path: Path) -> None:
    """Steps that were taken back count no more; those before and after do."""
    path = tmp_path / "journal.zo"
    optimizer, recorder = make(path)
    run(optimizer, recorder, 0, 5)
    kept = {name: tensor.clone() for name, tensor in optimizer.space.model.state_dict().items()}
    run(optimizer, recorder, 5, 9)
    recorder.go_back(Back(9, 5, 0.5))
    assert recorder.losses == []
    optimizer.space.model.load_state_dict(kept)
    run(optimizer, recorder, 9, 13)
    recorder.drain()
    model = Net()
    assert zl.replay(path, model) == 13
    assert state_bits(model) == state_bits(optimizer.space.model)
    model = Net()
    zl.replay(path, model, until_step=9)
    assert state_bits(model) == {name: state_bits_of(tensor) for name, tensor in kept.items()}
    assert [entry.row.step for entry in whole(path).surviving(8)] == list(range(8)), "before the return they counted"
    assert [entry.row.step for entry in whole(path).surviving()] == [*range(5), *range(9, 13)]


def state_bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_settings_of_steps_that_were_cut_off_do_not_stay(tmp_path: Path) -> None:
    """Resumed at one step with another seed, and then at the same step with the first seed again."""
    path, _ = journal_of(tmp_path, 8)
    for seed in (7, (1 << 63) + 5):
        optimizer = ZOOptimizer(DenseSpace(Net(torch.float32).eval()), GaussianSampler(), TwoPoint(2), lr=0.02, eps=0.1, seed=seed,
                                rule=SGD(weight_decay=0.01))  # fmt: skip
        zl.replay(path, optimizer.space.model, until_step=8)
        optimizer.param_groups[0].update(step=8, forwards=32)
        recorder = Recorder(path, optimizer, "net", earlier=read(path), keep=8)
        run(optimizer, recorder, 8, 12)
        recorder.drain()
        recorder.close()
        assert [entry.settings.seed for entry in read(path).entries] == [(1 << 63) + 5] * 8 + [seed] * 4
        model = Net(torch.float32).eval()
        zl.replay(path, model)
        assert state_bits(model) == state_bits(optimizer.space.model)


def test_an_earlier_journal_is_set_aside(tmp_path: Path) -> None:
    path, _ = journal_of(tmp_path, 4)
    old = path.read_bytes()
    optimizer, recorder = make(path)
    recorder.drain()
    assert path.read_bytes() == old, "not before a step was taken"
    run(optimizer, recorder, 0, 2)
    recorder.drain()
    assert (tmp_path / "previous.zo").read_bytes() == old
    assert read(path).steps == 2


def test_a_full_disk_leaves_whole_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    path = tmp_path / "journal.zo"
    optimizer, recorder = make(path)
    run(optimizer, recorder, 0, 4)
    before, real = path.read_bytes(), os.write

    def half(file: int, data: Any) -> int:
        if len(data) > 20:
            return real(file, bytes(data[:20]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        run(optimizer, recorder, 4, 8)
    assert path.read_bytes() == before


def test_scales_once_where_they_do_not_change(tmp_path: Path) -> None:
    path, _ = journal_of(tmp_path, 12)
    entries = read(path).entries
    rows = [entry.row for entry in entries]
    constant = pack_rows(rows, entries[0].settings, rows[0].scales, 0)
    changing = pack_rows([row._replace(scales=row.scales + row.step) for row in rows], entries[0].settings, rows[0].scales, 0)
    assert len(changing) - len(constant) == 11 * 7 * 4


class TestDeferred:
    """Moves of low rank that wait beside the weights."""

    def optimizer(self, path: Path, dtype: torch.dtype = torch.bfloat16, decay: float = 0.01) -> tuple[ZOOptimizer, Recorder]:
        optimizer = ZOOptimizer(DenseSpace(Net(dtype).eval()), LowRankSampler(2, 5), lr=0.02, eps=0.1, rule=SGD(decay))
        optimizer.deferred = True
        return optimizer, Recorder(path, optimizer, "net")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_replay(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """Looks at steps 3 and 8, inside windows, are part of the record; so is that none was taken elsewhere."""
        optimizer, recorder = self.optimizer(tmp_path / "journal.zo", dtype)
        seen = {}
        for first, last in ((0, 3), (3, 8), (8, 13)):
            run(optimizer, recorder, first, last)
            optimizer.settle()
            seen[last] = state_bits(optimizer.space.model)
        recorder.drain()
        assert read(recorder.path).looks == [3, 8, 13]
        for step, expected in seen.items():
            model = Net(dtype).eval()
            assert zl.replay(recorder.path, model, step) == step
            assert state_bits(model) == expected

    def test_a_run_that_goes_on_has_the_same_bits(self, tmp_path: Path) -> None:
        """It repeats recorded steps, looks where they were looked at, and refuses to look elsewhere."""
        optimizer, recorder = self.optimizer(tmp_path / "journal.zo")
        run(optimizer, recorder, 0, 3)
        optimizer.settle()
        run(optimizer, recorder, 3, 8)
        recorder.drain()
        journal = read(recorder.path)
        recorder.close()
        run(optimizer, None, 8, 13)
        optimizer.settle()
        again, _ = self.optimizer(tmp_path / "other.zo")
        again.repeat((entry.row for entry in journal.entries), journal.looks)
        for step in range(8):
            if step in again.looks.recorded:
                again.settle()
            elif step == 6:
                with pytest.raises(RuntimeError, match="without a look at the weights of step 6: resume with the old intervals"):
                    again.settle()
            again.step(lambda: torch.tensor(math.nan))
        run(again, None, 8, 13)
        again.settle()
        assert state_bits(again.space.model) == state_bits(optimizer.space.model)

    def test_weights_are_those_of_moves_made_at_once(self, tmp_path: Path) -> None:
        """To rounding; and while they wait, the weights stand still."""
        deferred, _ = self.optimizer(tmp_path / "journal.zo", torch.float64, decay=0)  # decay waits too, unseen by probes
        at_once = ZOOptimizer(DenseSpace(Net(torch.float64).eval()), LowRankSampler(2, 5), lr=0.02, eps=0.1)
        before = deferred.space.model.first.weight.detach().clone()
        run(deferred, None, 0, 2)
        assert torch.equal(deferred.space.model.first.weight, before)
        run(deferred, None, 2, 13)
        deferred.settle()
        run(at_once, None, 0, 13)
        for one, two in zip(deferred.space.model.parameters(), at_once.space.model.parameters(), strict=True):
            assert torch.allclose(one, two, rtol=0, atol=1e-6)

    def test_a_look_where_a_resumed_journal_ends(self, tmp_path: Path) -> None:
        """It is written although no step was made since."""
        optimizer, recorder = self.optimizer(tmp_path / "journal.zo")
        run(optimizer, recorder, 0, 4)
        recorder.close()
        journal = read(recorder.path)
        again, _ = self.optimizer(tmp_path / "other.zo")
        resumed = Recorder(recorder.path, again, "net", journal)
        again.repeat((entry.row for entry in journal.entries), journal.looks)
        for _ in range(4):
            again.step(lambda: torch.tensor(math.nan))
        again.settle()
        run(again, resumed, 4, 9)
        again.settle()
        resumed.drain()
        assert read(recorder.path).looks == [4, 9]
        model = Net(torch.bfloat16).eval()
        zl.replay(recorder.path, model)
        assert state_bits(model) == state_bits(again.space.model)

    def test_looks_keep_their_seed_and_a_space_its_way(self, tmp_path: Path) -> None:
        """A run that goes on with another seed, and not deferred; a space that a replay was given is used at once afterwards."""
        optimizer, recorder = self.optimizer(tmp_path / "journal.zo")
        run(optimizer, recorder, 0, 3)
        optimizer.settle()
        optimizer.param_groups[0]["seed"] = 7
        recorder.close()
        recorder = Recorder(recorder.path, optimizer, "net", read(recorder.path))
        run(optimizer, recorder, 3, 6)
        optimizer.deferred = False
        run(optimizer, recorder, 6, 8)
        recorder.drain()
        space = DenseSpace(Net(torch.bfloat16).eval())
        zl.replay(recorder.path, space)
        assert state_bits(space.model) == state_bits(optimizer.space.model)
        assert not space.deferred

    def test_loaded_weights_are_left_alone(self, tmp_path: Path) -> None:
        optimizer, _ = self.optimizer(tmp_path / "journal.zo")
        run(optimizer, None, 0, 5)
        saved = optimizer.state_dict()
        weights = {name: tensor.clone() for name, tensor in optimizer.space.model.state_dict().items()}
        expected = state_bits(optimizer.space.model)
        run(optimizer, None, 5, 7)
        optimizer.space.model.load_state_dict(weights)
        optimizer.load_state_dict(saved)
        optimizer.settle()
        assert state_bits(optimizer.space.model) == expected

"""Steps whose moves wait for the next step's probes: the bits of steps that move at once, whoever looks in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import VOCABULARY, bits, state_bits, tiny
from torch import Tensor, nn

import zolightning as zl
from zolightning.estimators import TwoPoint
from zolightning.journal import Recorder, read
from zolightning.objectives import CandidateCrossEntropy
from zolightning.objectives.base import BoundObjective
from zolightning.optim import SGD, Replicas, ZOOptimizer
from zolightning.policies import PertNN
from zolightning.samplers import GaussianSampler, PolicySampler, RademacherSampler
from zolightning.spaces import DenseSpace

pytestmark = pytest.mark.usefixtures("as_captured")
SAMPLERS: dict[str, Any] = {
    "gaussian": GaussianSampler,
    "policy": lambda: PolicySampler(PertNN(), RademacherSampler(), refresh_every=2),
}


class Candidates(CandidateCrossEntropy):
    """Not finite in some steps; fails in others."""

    factor = 1.0

    def rows(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        loss, weight = super().rows(model, batch)
        if not self.factor:
            raise ArithmeticError("broken")
        return loss * self.factor, weight


OBJECTIVE = Candidates()


def bound(model: nn.Module, step: int, factor: float = 1.0, wide: int = 2) -> BoundObjective:
    """A batch of 2 rows, 16 or 32 tokens wide."""
    OBJECTIVE.factor = factor
    ids = torch.randint(3, VOCABULARY, (2, 16 * (1 + step % wide)), generator=torch.Generator().manual_seed(step))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": torch.arange(2), "candidates": torch.tensor([[5, 6]] * 2)}
    return OBJECTIVE.on(model, batch)


def make(deferred: bool, sampler: Any = None, queries: int = 1) -> ZOOptimizer:
    space = DenseSpace(tiny("llama", torch.bfloat16, tied=True))
    optimizer = ZOOptimizer(space, sampler, TwoPoint(queries), lr=1e-2, eps=1e-2, rule=SGD(0.1))
    optimizer.deferred = deferred
    return optimizer


def waits(optimizer: ZOOptimizer) -> bool:
    late = optimizer.space._late  # type: ignore[attr-defined]
    return late is not None and bool(late._valid)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_bits(kind: str, tmp_path: Path) -> None:
    """Two widths, a rate that changes, weight decay, a step that is not finite, looks, a resumed run; a journal without any of it."""
    seen: dict[bool, list[Any]] = {False: [], True: []}
    for deferred, found in seen.items():
        optimizer = make(deferred, SAMPLERS[kind]())
        recorder = Recorder(tmp_path / f"{deferred}.zo", optimizer)
        for step in range(9):
            if step == 6:
                saved, older = optimizer.state_dict(), optimizer.space.model.state_dict()
                recorder.drain()
                optimizer = make(deferred, SAMPLERS[kind]())
                optimizer.space.model.load_state_dict(older)
                optimizer.load_state_dict(saved)
                found.append(saved["state"])
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.step(bound(optimizer.space.model, step, torch.nan if step == 2 else 1.0))
            assert optimizer.losses is not None
            found.append(bits(optimizer.losses))
            assert waits(optimizer) == (deferred and step != 2)
            if step == 4:
                optimizer.settle()
                found.append(state_bits(optimizer.space.model))
        optimizer.settle()
        found += [state_bits(optimizer.space.model), optimizer.skipped]
    assert repr(seen[True]) == repr(seen[False])
    journal = read(tmp_path / "True.zo")
    assert journal.looks == []
    assert (tmp_path / "True.zo").read_bytes() == (tmp_path / "False.zo").read_bytes()
    model = tiny("llama", torch.bfloat16, tied=True)
    assert zl.replay(tmp_path / "True.zo", model, 5) == 5
    assert state_bits(model) == seen[True][5]


def test_an_error_leaves_all_moves() -> None:
    """In the rehearsal of a new width, which is where Python runs."""
    optimizers = [make(deferred) for deferred in (False, True)]
    for optimizer in optimizers:
        for step in (0, 2, 4):
            optimizer.step(bound(optimizer.space.model, step))
        with pytest.raises(ArithmeticError):
            optimizer.step(bound(optimizer.space.model, 1, 0.0))
        optimizer.settle()
    assert len({repr(state_bits(optimizer.space.model)) for optimizer in optimizers}) == 1
    for optimizer in optimizers:
        optimizer.step(bound(optimizer.space.model, 1))
        optimizer.step(lambda optimizer=optimizer: bound(optimizer.space.model, 3)())  # an ordinary closure, which is not captured
        assert not waits(optimizer)
        optimizer.step(bound(optimizer.space.model, 4))
        optimizer.param_groups[0]["seed"] = 8
        optimizer.step(bound(optimizer.space.model, 5))
        optimizer.deferred = False
        assert not waits(optimizer)
    assert len({repr(state_bits(optimizer.space.model)) for optimizer in optimizers}) == 1


def test_several_directions_move_at_once() -> None:
    optimizer = make(True, queries=2)
    optimizer.step(bound(optimizer.space.model, 0))
    assert not waits(optimizer)


def test_replicas_and_new_optimizers_look_at_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(True)
    optimizer.step(bound(optimizer.space.model, 0))
    assert waits(optimizer)
    monkeypatch.setattr(Replicas, "gather", lambda self, values, counts: values)
    monkeypatch.setattr(Replicas, "world", 1)
    Replicas().check(1, optimizer.space, bound(optimizer.space.model, 0))
    assert not waits(optimizer)
    optimizer.step(bound(optimizer.space.model, 0))
    assert waits(optimizer)
    ZOOptimizer(optimizer.space, optimizer.sampler)
    assert not waits(optimizer)


def test_recorded_steps_may_be_looked_at_anywhere() -> None:
    """A run that goes on from its journal need not look where the older one did."""
    optimizer = make(True)
    optimizer.step(bound(optimizer.space.model, 0))
    optimizer.step(bound(optimizer.space.model, 0))
    rows = optimizer.history.drain(2)
    optimizer.step(bound(optimizer.space.model, 0))
    optimizer.settle()
    again = make(True)
    again.repeat(rows)
    again.step(lambda: torch.tensor(0.0))
    again.settle()
    again.step(lambda: torch.tensor(0.0))
    again.step(bound(again.space.model, 0))
    again.settle()
    assert state_bits(again.space.model) == state_bits(optimizer.space.model)

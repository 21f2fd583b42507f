"""Rewards: by name, by import path, called; what they see, what goes wrong, and that they steer a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import hook_count, state_bits, tiny
from runs import FILMS, QUESTIONS, film_data
from torch import nn

import zolightning as zl
from zolightning.objectives.generate import generate_text
from zolightning.objectives.reward import accuracy, exact_match, f1, find_reward
from zolightning.samplers.base import Direction
from zolightning.tasks import Example

ROME = Example("Where is Rome?", (), None, answers=("the city of Rome", "Rome, Italy"))
FILM = Example("It was", (" bad", " good", " great"), 1, labels=(1, 2))


def direction(space: zl.Space, step: int = 0) -> Direction:
    """A Gaussian direction."""
    sampler = zl.GaussianSampler()
    sampler.bind(space)
    return sampler.directions(0, step, 1)[0]


class TestNames:
    @pytest.mark.parametrize(
        ("prediction", "overlap", "exact"),
        [
            ("The city of Rome!", 1.0, 1.0),  # case, articles and punctuation do not count
            ("Rome", 2 / 3, 0.0),  # best of: 2*1*1/3/(1+1/3) = .5 and 2/3
            ("rome italy", 1.0, 1.0),
            ("Paris", 0.0, 0.0),
            ("", 0.0, 0.0),
        ],
    )
    def test_f1_and_exact_match(self, prediction: str, overlap: float, exact: float) -> None:
        assert f1(prediction, ROME) == pytest.approx(overlap)
        assert exact_match(prediction, ROME) == exact

    def test_accuracy(self) -> None:
        assert [accuracy(text, FILM) for text in FILM.candidates] == [0.0, 1.0, 1.0], "any right candidate counts"
        assert accuracy(" bad", Example("", (" bad", " good"), 0)) == 1.0

    def test_by_name_path_and_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "my_rewards_xyz.py").write_text("def brevity(prediction, example):\n    return 1 / (1 + len(prediction))\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert find_reward("f1") is f1
        assert find_reward("my_rewards_xyz.brevity")("abc", None) == 0.25
        assert find_reward(accuracy) is accuracy
        assert (zl.Reward("my_rewards_xyz.brevity").name, zl.Reward(accuracy).name) == ("my_rewards_xyz.brevity", "accuracy")
        assert zl.Reward("f1").several_forwards
        assert not zl.Reward("f1", predict="choose").several_forwards

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("nope", "Empty module name"),
            ("no_such_module_xyz.nope", "No module named 'no_such_module_xyz'"),
            ("math.nope", "module 'math' has no attribute 'nope'"),
        ],
    )
    def test_not_importable(self, name: str, reason: str) -> None:
        message = f"reward {name!r} is neither one of f1, exact_match, accuracy nor a function to import ({reason})"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            zl.Reward(name)

    def test_not_a_function(self) -> None:
        with pytest.raises(ValueError, match=r"^reward 'math.pi' is not a function$"):
            zl.Reward("math.pi")


def fails(prediction: str, example: Any) -> float:
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, "reward 'fails' raised KeyError: 'gone' (prediction 'Rome')"),
        (lambda p, e: math.nan, "reward '<lambda>' returned nan for the prediction 'Rome'"),
        (lambda p, e: -math.inf, "reward '<lambda>' returned -inf for the prediction 'Rome'"),
        (lambda p, e: "good", "reward '<lambda>' raised ValueError: could not convert string to float: 'good' (prediction 'Rome')"),
        (lambda p, e: None, "reward '<lambda>' raised TypeError: float() argument must be a string or a real number, not 'NoneType'"),
        (lambda p: 1.0, "reward '<lambda>' raised TypeError: "),
    ],
)
def test_bad_function(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        zl.Reward(function).rewards(["Rome"], [ROME])


def test_choose(lively: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The function sees the best candidate and its own row; the loss is one minus the mean."""
    data = film_data(tmp_path, tokenizer=tokenizer, batch_size=16)
    data.setup("fit")
    batch, seen = data.train_batch(1), []

    def function(prediction: str, example: Any) -> float:
        seen.append((prediction, example))
        return len(seen) / 10

    objective = zl.Reward(function, predict="choose")
    objective.prepare(tokenizer, data.train_examples)
    loss, weight = objective.rows(lively, batch)
    best = zl.objectives.candidate_scores(lively, batch).argmax(1).tolist()
    rows = [data.train_examples[index] for index in batch["index"].tolist()]
    assert seen == [(row.candidates[choice], row) for row, choice in zip(rows, best, strict=True)]
    assert loss.tolist() == pytest.approx([1 - (n + 1) / 10 for n in range(16)])
    assert weight.tolist() == [1.0] * 16
    seen.clear()
    assert float(objective.on(lively, batch, micro_batch_size=5)()) == pytest.approx(1 - 0.85), "micro-batches keep rows and order"


def test_generate(lively: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = film_data(tmp_path, "squad", QUESTIONS, tokenizer=tokenizer, batch_size=4)
    data.setup("fit")
    batch = data.train_batch(0)
    objective = zl.Reward(lambda prediction, example: len(prediction) + len(example.answers[0]) / 100, max_new_tokens=3)
    objective.prepare(tokenizer, data.train_examples)
    texts = generate_text(lively, tokenizer, batch, 3)
    rows = [data.train_examples[index] for index in batch["index"].tolist()]
    expected = [1 - len(text) - len(row.answers[0]) / 100 for text, row in zip(texts, rows, strict=True)]
    assert objective.rows(lively, batch)[0].tolist() == pytest.approx(expected)


def test_choose_without_candidates(tokenizer: Any, tmp_path: Path) -> None:
    data = film_data(tmp_path, "squad", QUESTIONS, tokenizer=tokenizer)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"^predict='choose' needs a task with candidates; this one has free answers: use"):
        zl.Reward("f1", predict="choose").prepare(tokenizer, data.train_examples)


CASES: dict[str, tuple[str, list[dict[str, Any]], Callable[[str, Any], float]]] = {
    "choose": ("sst2", FILMS, lambda prediction, example: float("terrible" in prediction)),
    "generate": ("squad", QUESTIONS, lambda prediction, example: sum(c in "aeiou" for c in prediction) / 8),
}


@pytest.mark.parametrize("predict", CASES)
def test_steers_the_model(predict: Any, lively: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A function without a gradient: the reward of all rows goes up."""
    task, rows, function = CASES[predict]
    data = film_data(tmp_path, task, rows, tokenizer=tokenizer, batch_size=12)
    data.setup("fit")
    objective = zl.Reward(function, predict=predict, max_new_tokens=2)
    objective.prepare(tokenizer, data.train_examples)
    optimizer = zl.ZOOptimizer(zl.DenseSpace(lively), zl.RademacherSampler(), lr=3e-3, eps=3e-2)
    start = float(objective.on(lively, data.train_batch(0))())
    for step in range(20):
        optimizer.step(objective.on(lively, data.train_batch(step)))
    assert float(objective.on(lively, data.train_batch(0))()) < start - 0.3


class TestHeldProbes:
    """Generation runs many forwards, so a probe holds its perturbed weights."""

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_same_loss_as_hooks(self, family: str, tied: bool) -> None:
        model = tiny(family, tied=tied)
        space = zl.DenseSpace(model)
        along, ids = direction(space), torch.arange(5, 13).view(1, -1)
        before = state_bits(model)
        losses = []
        for hold in (False, True):
            with torch.no_grad(), space.probe(along, 0.1, hold):
                losses.append(model(input_ids=ids, use_cache=False).logits)
        assert torch.equal(*losses)
        with torch.no_grad():
            assert not torch.equal(losses[0], model(input_ids=ids, use_cache=False).logits)
        assert state_bits(model) == before

    def test_tied_weights_stay_tied(self) -> None:
        model: Any = tiny("llama", tied=True)
        space = zl.DenseSpace(model)
        with space.probe(direction(space), 0.1, hold=True):
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert model.lm_head.weight is not space.blocks[0].tensor
        assert model.lm_head.weight is model.model.embed_tokens.weight is space.blocks[0].tensor

    def test_no_hooks(self) -> None:
        model = tiny("llama")
        space = zl.DenseSpace(model)
        with space.probe(direction(space), 0.1, hold=True):
            assert hook_count(model) == 0

    @pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt, SystemExit])
    def test_nothing_is_left_after_an_error(self, error: type[BaseException]) -> None:
        model = tiny("llama")
        space = zl.DenseSpace(model)
        before, objects = state_bits(model), [id(p) for p in model.parameters()]

        def probe() -> None:
            with space.probe(direction(space), 0.1, hold=True):
                assert state_bits(model) != before
                raise error

        with pytest.raises(error):
            probe()
        assert state_bits(model) == before
        assert [id(p) for p in model.parameters()] == objects

    def test_an_interrupt_while_weights_are_swapped_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C between two blocks."""
        from zolightning.kernels import plain

        model = tiny("llama")
        space = zl.DenseSpace(model)
        before, real, count = state_bits(model), plain.materialise, [0]

        def interrupted(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == 5:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(plain, "materialise", interrupted)
        with pytest.raises(KeyboardInterrupt), space.probe(direction(space), 0.1, hold=True):
            pytest.fail("the probe must not start")
        assert count == [5]
        assert state_bits(model) == before

    def test_a_leak_is_found(self) -> None:
        """A module that keeps a weight under another name would read the old one."""

        class Keeper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
                self.kept = [self.last.weight]

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return nn.functional.linear(self.first(x), self.kept[0])

        model = Keeper().eval()
        space = zl.DenseSpace(model)
        with torch.no_grad(), pytest.raises(ValueError, match=r"^'last.weight': read outside the forward"):
            space.verify(lambda: model(torch.ones(1, 4)).sum(), direction(space), 0.1, hold=True)

    def test_reading_a_childs_weight_is_no_leak(self) -> None:
        """With weights held, a parent that reads its child's weight sees the perturbed one: nothing to lift."""

        class Parent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.child = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return nn.functional.linear(x, self.child.weight)

        model = nn.Sequential(Parent()).eval()
        space = zl.DenseSpace(model, include=["*weight"])
        evaluate = lambda: model(torch.ones(1, 4)).sum()  # noqa: E731
        with torch.no_grad():
            assert space.verify(evaluate, direction(space), 0.1, hold=True).lifted == []
            assert space.verify(evaluate, direction(space), 0.1, hold=False).lifted == ["0.child.weight"]

    def test_the_set_up_probe_passes_generation(self, lively: Any, tokenizer: Any, tmp_path: Path) -> None:
        """The key-value cache of ``generate`` is written, the model's own buffers and weights are not."""
        data = film_data(tmp_path, "squad", QUESTIONS, tokenizer=tokenizer)
        data.setup("fit")
        objective = zl.Reward("f1", max_new_tokens=3)
        objective.prepare(tokenizer, data.train_examples)
        optimizer = zl.ZOOptimizer(zl.DenseSpace(lively), eps=1e-2)
        optimizer.step(objective.on(lively, data.train_batch(0)))
        assert optimizer.setup_report is not None
        assert (optimizer.setup_report.unread, optimizer.setup_report.lifted) == ([], [])

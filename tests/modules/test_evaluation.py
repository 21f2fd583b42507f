"""Figures of validation: equal to plain computations, one sequence at a time, for each kind of task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FILMS, QUESTIONS, film_data
from torch import Tensor, nn
from torch.nn import functional as F

import zolightning as zl
from zolightning.models import load_model, load_tokenizer
from zolightning.modules.evaluation import EVALUATIONS, AnswerEvaluation, CandidateEvaluation, Context, Evaluation, GoldEvaluation
from zolightning.objectives import fit_biases
from zolightning.objectives.generate import generate_text
from zolightning.objectives.reward import squad_scores
from zolightning.tasks import Example

LONG = zl.TemplateTask("{sentence} It was", [" terrible indeed", " great", " so so"])


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def tokenizer(tiny_folder: str) -> Any:
    return load_tokenizer(tiny_folder)


@pytest.fixture
def model(tiny_folder: str) -> nn.Module:
    model = load_model(tiny_folder, "float32")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(3)
    return model


def log_probs(model: nn.Module, tokenizer: Any, prompt: str, answer: str) -> Tensor:
    """Log-probability of each token of the answer: no padding, no batch, all logits."""
    prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    table = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    return torch.stack([table[at - 1, ids[at]] for at in range(len(prompt_ids), len(ids))])


def scores(model: nn.Module, tokenizer: Any, examples: list[Example]) -> Tensor:
    """Length-normalised scores of all candidates, [N, K]."""
    return torch.stack([torch.stack([log_probs(model, tokenizer, e.prompt, c).mean() for c in e.candidates]) for e in examples])


def run(evaluation: Evaluation, model: nn.Module, loaders: Any) -> list[dict[str, Any]]:
    """All loaders; the predictions."""
    out = []
    for number, loader in enumerate(loaders):
        for batch in loader:
            out += evaluation.update(model, batch, number)
    return out


@pytest.mark.parametrize("task", ["sst2", LONG], ids=["one-token", "sequences"])
def test_candidates(task: Any, model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    data = film_data(tmp_path, task, tokenizer=tokenizer, num_validation=21, eval_batch_size=8)
    data.setup("fit")
    assert data.one_forward == (task == "sst2")
    own = torch.linspace(0.0, 2.0, len(data.validation_examples[0].candidates))
    evaluation = CandidateEvaluation(Context(data.validation_examples, biases=own))
    predictions = run(evaluation, model, data.val_dataloader())
    figures = evaluation.figures()

    plain, labels = scores(model, tokenizer, data.validation_examples), torch.tensor([e.label for e in data.validation_examples])
    train, train_labels = scores(model, tokenizer, data.train_examples[:16]), torch.tensor([e.label for e in data.train_examples[:16]])
    fitted = fit_biases(train, train_labels)
    share = torch.bincount(train_labels, minlength=plain.shape[1]).double().clamp_min(0.5)
    constant = torch.log(share / share.sum()).expand(21, -1)
    for suffix, table in (("", plain), ("_calibrated", plain + own), ("_corrected", plain + fitted)):
        assert figures[f"loss{suffix}"] == pytest.approx(float(F.cross_entropy(table, labels)), abs=1e-4)
        assert figures[f"accuracy{suffix}"] == pytest.approx(float((table.argmax(1) == labels).double().mean()))
    assert figures["constant_loss"] == pytest.approx(float(F.cross_entropy(constant, labels)))
    assert figures["constant_accuracy"] == float((constant.argmax(1) == labels).double().mean())
    assert figures["loss"] != pytest.approx(figures["loss_corrected"], abs=1e-3)

    shifted = torch.softmax(plain + own, dim=1)
    assert [p["index"] for p in predictions] == list(range(21))
    assert [p["label"] for p in predictions] == labels.tolist()
    assert [p["prediction"] for p in predictions] == shifted.argmax(1).tolist()
    assert torch.allclose(torch.tensor([p["probabilities"] for p in predictions]).double(), shifted, atol=1e-5)
    names = [c.strip() for c in data.validation_examples[0].candidates]
    assert [p["text"] for p in predictions] == [names[p["prediction"]] for p in predictions]


def test_candidates_without_labels_or_training_rows(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    data = film_data(tmp_path, tokenizer=tokenizer, calibration_rows=0)
    data.setup("fit")
    evaluation = CandidateEvaluation()
    batch = next(iter(data.val_dataloader()[0]))
    evaluation.update(model, batch)
    assert set(evaluation.figures()) == {"loss", "accuracy"}
    unlabelled = CandidateEvaluation()
    assert len(unlabelled.update(model, {**batch, "label": torch.full_like(batch["label"], -1)})) == 16
    assert unlabelled.figures() == {}


def test_batches_with_fewer_candidates() -> None:
    """Rows of different widths: the gap never wins and costs nothing."""
    table = {
        "a": torch.tensor([[1.0, 2.0]]),
        "b": torch.tensor([[0.0, 1.0, 3.0]]),
    }

    class Fixed(CandidateEvaluation):
        def feed(self, scores: Tensor, label: int) -> None:
            self._scores[0].append(scores)
            self._labels[0].append(torch.tensor([label]))

    evaluation = Fixed()
    evaluation.feed(table["a"], 1)
    evaluation.feed(table["b"], 2)
    expected = -(torch.log_softmax(table["a"][0], 0)[1] + torch.log_softmax(table["b"][0], 0)[2]) / 2
    assert evaluation.figures()["loss"] == pytest.approx(float(expected))
    assert evaluation.figures()["accuracy"] == 1.0


CLOZE = [
    {
        "passage": f"{a} met {b}.\n@highlight\nThey talked",
        "query": "Then @placeholder went home.",
        "entities": [a, b, "Nobody"],
        "answers": right,
    }
    for a, b, right in (("Ann", "Bob", ["Ann"]), ("Cy", "Dee", ["Cy", "Dee"]), ("Eve", "Flo", ["Flo", "Eve", "Nobody"]), ("G", "H", ["H"]))
]


def test_gold_with_several_right_answers(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    data = film_data(tmp_path, "record", CLOZE, tokenizer=tokenizer, eval_batch_size=3)
    data.setup("fit")
    evaluation = GoldEvaluation(Context(data.validation_examples))
    predictions = run(evaluation, model, data.val_dataloader())
    figures = evaluation.figures()
    examples = data.validation_examples
    plain = scores(model, tokenizer, examples)
    gold = torch.cat([-log_probs(model, tokenizer, e.prompt, e.candidates[e.label or 0]) for e in examples])
    assert figures["loss"] == pytest.approx(float(gold.mean()), abs=1e-4)
    hits = [choice in example.labels for choice, example in zip(plain.argmax(1).tolist(), examples, strict=True)]
    assert figures["accuracy"] == sum(hits) / 4
    assert any(p["prediction"] != p["label"] and hit for p, hit in zip(predictions, hits, strict=True)), "a second right answer was chosen"
    assert [p["prediction"] for p in predictions] == plain.argmax(1).tolist()
    assert [p["text"] for p in predictions] == [e.candidates[c].strip() for e, c in zip(examples, plain.argmax(1).tolist(), strict=True)]


def test_answers(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    """Loss over all answer tokens; exact match and F1 of what is generated, the best of all accepted answers."""
    first = film_data(tmp_path, "squad", QUESTIONS, tokenizer=tokenizer)
    first.setup("fit")
    said = {}
    for batch in first.val_dataloader()[0]:
        texts = generate_text(model, tokenizer, batch, 4)
        said |= {first.validation_examples[i].prompt: text for i, text in zip(batch["index"].tolist(), texts, strict=True)}
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(QUESTIONS):  # some answers are what the model will say, alone or with more words
        text = said[f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question']}\nAnswer:"]
        rows.append({**row, "answers": {"text": [row["answers"]["text"][0], [text, f"{text} and more", "else"][number % 3]]}})
    data = film_data(tmp_path, "squad", rows, tokenizer=tokenizer, eval_batch_size=4)
    data.setup("fit")
    evaluation = AnswerEvaluation(Context(data.validation_examples, tokenizer, 4, "f1"))
    predictions = run(evaluation, model, data.val_dataloader())
    figures = evaluation.figures()
    losses = torch.cat([-log_probs(model, tokenizer, e.prompt, f" {e.answers[0]}\n") for e in data.validation_examples])
    assert figures["loss"] == pytest.approx(float(losses.mean()), abs=1e-4)
    assert [p["prediction"] for p in predictions] == [said[e.prompt] for e in data.validation_examples]
    assert [p["answers"] for p in predictions] == [list(e.answers) for e in data.validation_examples]
    marks = [squad_scores(said[e.prompt], e.answers) for e in data.validation_examples]
    assert figures["exact_match"] == pytest.approx(sum(exact for exact, _ in marks) / 15)
    assert figures["f1"] == pytest.approx(sum(overlap for _, overlap in marks) / 15)
    assert 0 < figures["exact_match"] < figures["f1"] < 1


def test_answers_without_text(model: nn.Module) -> None:
    """Token sequences of a plain DataLoader: the loss alone; rows without an answer have none."""
    ids = torch.randint(3, 200, (3, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "scored": torch.tensor([2, 3, 1])}
    evaluation = AnswerEvaluation()
    assert evaluation.figures() == {}
    assert evaluation.update(model, batch) == []
    table = torch.log_softmax(model(input_ids=ids).logits.double(), -1)
    expected = [-table[row, at - 1, ids[row, at]] for row, count in enumerate((2, 3, 1)) for at in range(7 - count, 7)]
    assert evaluation.figures() == {"loss": pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)}


@pytest.mark.parametrize(
    ("kind", "task", "rows"), [("candidates", "sst2", FILMS), ("gold", "record", CLOZE), ("answer", "squad", QUESTIONS)]
)
def test_reward_figure(kind: str, task: str, rows: Any, model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    """The mean reward of the predictions, where the reward judges predictions of that kind."""
    data = film_data(tmp_path, task, rows, tokenizer=tokenizer, calibration_rows=0)
    data.setup("fit")
    made = {"candidates": "choose", "gold": "choose", "answer": "generate"}[kind]
    for predict in ("choose", "generate"):
        reward = zl.Reward(lambda prediction, example: len(prediction) / 7 + len(example.prompt), predict=predict)  # type: ignore[arg-type]
        evaluation = EVALUATIONS[kind](Context(data.validation_examples, tokenizer, 3, reward=reward))
        predictions = run(evaluation, model, data.val_dataloader())
        figures = evaluation.figures()
        if predict != made:
            assert "reward" not in figures
            continue
        texts = [
            p["prediction"] if kind == "answer" else data.validation_examples[p["index"]].candidates[p["prediction"]] for p in predictions
        ]
        expected = [len(t) / 7 + len(data.validation_examples[p["index"]].prompt) for t, p in zip(texts, predictions, strict=True)]
        assert figures["reward"] == pytest.approx(sum(expected) / len(expected))

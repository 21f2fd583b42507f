"""Meta-training through the Trainer: files, teachers, resets, several tasks, resuming, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from nets import CONFIGS, state_bits
from runs import FILMS, film_data, make_module, make_trainer
from test_modules import saved, token_loader
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import zolightning as zl
from zolightning.modules import BlockStatistics, ByLoss, LargestDecrease, MetaPoint, Ratio, SharedRatio, UpperHalf, Verdict
from zolightning.modules.meta_objectives import _RunningMean
from zolightning.modules.teacher import Teacher
from zolightning.policies import FeaturePolicy, Normaliser, PertNN, Table, Uniform
from zolightning.spaces import Space


def meta_module(folder: str, **options: Any) -> zl.PolicyMetaTrainModule:
    """A module in float32."""
    return zl.PolicyMetaTrainModule(folder, **{"dtype": "float32", **options})


class Record(zl.MetaObjective):
    """Wants small scales, and writes down where it was asked."""

    def __init__(self) -> None:
        self.points: list[MetaPoint] = []
        self.weights: list[dict[str, bytes]] = []
        self.biases: list[Any] = []

    def __call__(self, point: MetaPoint, scales: Tensor) -> Verdict:
        self.points.append(point)
        self.weights.append(state_bits(point.space.model))
        biases = getattr(point.objective, "biases", None)
        self.biases.append(None if biases is None else biases.clone())
        return Verdict(scales.square().sum() / 2, scales)


def films(folder: Path, **options: Any) -> Any:
    return film_data(folder, batch_size=8, **options)


def two_tasks(folder: Path) -> zl.MultiTaskDataModule:
    turned = [{**row, "label": 1 - row["label"]} for row in FILMS[:20]]
    (folder / "other").mkdir(exist_ok=True)
    return zl.MultiTaskDataModule([films(folder), films(folder / "other", rows=turned)])


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "published": lambda: {"teacher": zl.MomentumSGD(reset_every=4)},
    "one copy": lambda: {"teacher": zl.OneCopySGD(0.1, reset_every=4), "dtype": "bfloat16", "checkpoint_layers": True},
    "learned": lambda: {
        "meta_objective": zl.ExpectedDecrease(warm_up=1, memory=0.5), "policy": FeaturePolicy(), "teacher": zl.ZerothOrder(1e-3, 1e-2, 4),
        "refit_biases_every": 2,
    },
    "closed form": lambda: {
        "meta_objective": zl.ClosedForm(warm_up=1), "teacher": zl.OneCopySGD(0.1, reset_every=4), "sampler": zl.RademacherSampler(),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
class TestRuns:
    def test_resumes_to_the_same_bits(self, case: str, tiny_folder: str, tmp_path: Path) -> None:
        """In the middle of a period and of an epoch; and the same seed gives the same bits."""
        whole = meta_module(tiny_folder, **CASES[case]())
        make_trainer(tmp_path, 7).fit(whole, two_tasks(tmp_path))
        first = meta_module(tiny_folder, **CASES[case]())
        trainer = make_trainer(tmp_path, 3)
        trainer.fit(first, two_tasks(tmp_path))
        saved(trainer, tmp_path / "half.ckpt")
        rest = meta_module(tiny_folder, **CASES[case]())
        make_trainer(tmp_path, 7).fit(rest, two_tasks(tmp_path), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
        assert state_bits(rest.language_model) == state_bits(whole.language_model)
        assert state_bits(rest.policy) == state_bits(whole.policy)
        assert rest.forwards == whole.forwards > 0
        for one, other in zip(rest.meta_objective.statistics(), whole.meta_objective.statistics(), strict=True):
            assert torch.equal(one.gradient, other.gradient)

    def test_the_files_that_a_run_leaves(self, case: str, tiny_folder: str, tmp_path: Path) -> None:
        module = meta_module(tiny_folder, **CASES[case]())
        trainer = make_trainer(tmp_path, 3)
        trainer.fit(module, films(tmp_path))
        assert trainer.global_step == 3
        named = yaml.safe_load((tmp_path / "sampler.yaml").read_text())
        assert named["class_path"] == "zolightning.PolicySampler"
        assert Path(named["init_args"]["policy"]).is_absolute()
        policy = zl.Policy.from_pretrained(named["init_args"]["policy"])
        assert type(policy) is type(module.policy)
        assert policy.base_model == tiny_folder
        assert policy.trained["steps"] == 3
        for name, tensor in policy.state_dict().items():
            assert torch.equal(tensor, module.policy.state_dict()[name])
        written = sorted(tmp_path.glob("statistics_*.safetensors"))
        assert [BlockStatistics.load(path).rows for path in written] == ([24] if "meta_objective" in CASES[case]() else [])
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert figures.keys() >= {"train/loss", "train/meta_loss", "train/nu", "train/spread", "train/forwards"}
        assert figures["train/forwards"] == 3 * module.forwards_per_step
        if case == "closed form":
            assert named["init_args"]["base"] == "zolightning.samplers.rademacher.RademacherSampler"
        run = make_module(tiny_folder, sampler=zl.PolicySampler(**{k: v for k, v in named["init_args"].items() if k != "base"}))
        make_trainer(tmp_path, 2).fit(run, films(tmp_path))
        assert run.zo_optimizer.steps == 2


def test_each_period_starts_at_the_pretrained_weights(tiny_folder: str, tmp_path: Path) -> None:
    record = Record()
    make_trainer(tmp_path, 7).fit(
        meta_module(tiny_folder, meta_objective=record, teacher=zl.OneCopySGD(0.1, reset_every=3)), films(tmp_path)
    )
    assert record.weights[0] == record.weights[3] == record.weights[6]
    assert len({tuple(sorted(w.items())) for w in record.weights}) == 5


def test_the_rate_of_a_period() -> None:
    teacher = zl.OneCopySGD(lr=0.4, reset_every=4)
    assert [teacher.rate(step) for step in range(6)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.4, 0.3])


def test_several_tasks_take_turns(tiny_folder: str, tmp_path: Path) -> None:
    """Each with rows, objective and biases of its own."""
    record, data = Record(), two_tasks(tmp_path)
    make_trainer(tmp_path, 6).fit(meta_module(tiny_folder, meta_objective=record, refit_biases_every=2), data)
    assert [point.task for point in record.points] == [0, 1, 0, 1, 0, 1]
    for step, point in enumerate(record.points):
        own = data.sources[step % 2].train_batch(step // 2)
        assert torch.equal(point.batch["input_ids"], own["input_ids"])
    first, second = record.points[0].objective, record.points[1].objective
    assert first is not second
    assert first is record.points[4].objective
    one, _, again, _, refitted, _ = (biases.tolist() for biases in record.biases)
    assert one == again
    assert one != refitted
    with pytest.raises(ValueError, match="sources is empty"):
        zl.MultiTaskDataModule([])


def test_biases_take_the_prior_out(tiny_folder: str, tmp_path: Path) -> None:
    """They are those that minimise the loss of the calibration rows at the weights of the step."""
    record, data = Record(), films(tmp_path)
    module = meta_module(tiny_folder, meta_objective=record, refit_biases_every=1, teacher=zl.OneCopySGD(lr=0.0))
    make_trainer(tmp_path, 1).fit(module, data)
    (batch,) = data.val_dataloader()[1]
    with torch.no_grad():
        scores = zl.objectives.candidate_scores(module.language_model, batch)
    assert record.biases[0].tolist() == pytest.approx(zl.objectives.fit_biases(scores, batch["label"]).tolist(), abs=1e-6)


def test_the_policy_learns_what_the_objective_says(tiny_folder: str, tmp_path: Path) -> None:
    module = meta_module(tiny_folder, policy=Table(Normaliser("none")), meta_objective=Record(), teacher=zl.OneCopySGD(lr=0.0))
    make_trainer(tmp_path, 3).fit(module, films(tmp_path))
    assert module.policy.values.tolist() == pytest.approx([0.9**3] * len(module.space.blocks))


def test_plain_dataloader(tiny_folder: str, tmp_path: Path) -> None:
    """Token sequences: no data module, no task."""
    module = meta_module(tiny_folder, meta_objective=zl.ExpectedDecrease(warm_up=1), policy=Table())
    make_trainer(tmp_path, 3).fit(module, token_loader())
    assert (tmp_path / "policy.safetensors").exists()


class Forever(Teacher):
    """A teacher of one's own."""

    def step(self, space: Space, loss: Callable[[], Tensor], step: int, seed: int, checkpoint: bool = False) -> Tensor:
        with torch.no_grad():
            return loss()


def test_a_teacher_of_ones_own(tiny_folder: str, tmp_path: Path) -> None:
    module = meta_module(tiny_folder, teacher=Forever(0.0, 5))
    make_trainer(tmp_path, 2).fit(module, films(tmp_path))
    assert (tmp_path / "policy.safetensors").exists()


def test_a_verdict_that_is_not_finite_teaches_nothing(tiny_folder: str, tmp_path: Path) -> None:
    class Broken(zl.MetaObjective):
        def __call__(self, point: MetaPoint, scales: Tensor) -> Verdict:
            return Verdict(scales.new_full((), float("nan")), torch.full_like(scales, float("inf")))

    module = meta_module(tiny_folder, policy=Table(), meta_objective=Broken())
    make_trainer(tmp_path, 2).fit(module, films(tmp_path))
    assert set(module.policy.values.tolist()) == {1.0}


@pytest.mark.parametrize("rule", [None, LargestDecrease()], ids=["ratio", "decrease"])
def test_the_table_follows_from_the_statistics(rule: Any, tiny_folder: str, tmp_path: Path) -> None:
    objective = zl.ClosedForm(rule, warm_up=1)
    module = meta_module(tiny_folder, meta_objective=objective)
    make_trainer(tmp_path, 3).fit(module, films(tmp_path))
    (found,) = objective.statistics()
    ratio = (found.gradient.clamp_min(0) / found.fisher.clamp_min(1e-300)).sqrt()
    expected = ratio if rule is None else found.decrease_scales(0.1)
    values = module.policy.values.detach().double()
    torch.testing.assert_close(values / values.max(), expected / expected.max(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("space", [partial(zl.AdapterSpace, rank=2), partial(zl.LowRankSpace, rank=2, slots=2)], ids=["adapter", "bank"])
def test_a_reset_of_what_stands_beside_the_weights(space: Any, tiny_folder: str, tmp_path: Path) -> None:
    """The teacher starts again where the space's own blocks began."""
    module = meta_module(tiny_folder, space=space, teacher=zl.OneCopySGD(0.1, reset_every=2), meta_objective=Record())
    make_trainer(tmp_path, 4).fit(module, films(tmp_path))
    weights = module.meta_objective.weights  # type: ignore[attr-defined]
    assert weights[0] == weights[2] != weights[1]


def test_memory_of_the_running_means() -> None:
    """Each step weighs twice as much as the one before it."""
    mean = _RunningMean()
    for value in (1.0, 2.0, 4.0):
        numbers = torch.full((2,), value, dtype=torch.float64)
        mean.add(BlockStatistics(("a", "b"), numbers, 2 * numbers, 3 * numbers, 8, 8), 0.5)
    average = (0.25 * 1 + 0.5 * 2 + 1 * 4) / 1.75
    assert mean.value().gradient.tolist() == pytest.approx([average] * 2)
    assert mean.value().fisher.tolist() == pytest.approx([3 * average] * 2)
    assert (mean.steps, mean.value().rows) == (3, 24)


def test_too_few_steps_for_a_table(tiny_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, 2).fit(meta_module(tiny_folder, meta_objective=zl.ClosedForm()), films(tmp_path))
    assert "the scales are still equal: no task has 8 steps" in caplog.text


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: meta_module("x", seed=-1), "seed=-1"),
            (lambda: meta_module("x", refit_biases_every=-1), "refit_biases_every=-1"),
            (lambda: meta_module("x", refresh_every=0), "refresh_every=0"),
            (lambda: meta_module("x", objective=zl.Reward("accuracy", "choose")), "a reward has no gradient"),
            (
                lambda: meta_module("x", policy=PertNN(), meta_objective=zl.ClosedForm()),
                "this closed form makes a Table of its own: leave policy=PertNN out",
            ),
            (lambda: zl.AfterStep(lr=0.0), "lr=0.0 of the meta-objective"),
            (lambda: zl.AfterStep(eps=float("inf")), "eps=inf of the meta-objective"),
            (lambda: zl.ExpectedDecrease(lr=-1.0), "lr=-1.0 of the meta-objective"),
            (lambda: zl.ExpectedDecrease(alignment=2.0), "alignment=2.0"),
            (lambda: zl.ExpectedDecrease(memory=0.0), "memory=0.0"),
            (lambda: zl.ExpectedDecrease(warm_up=0), "warm_up=0"),
            (lambda: LargestDecrease(alignment=0.0), "alignment=0.0 must be above 0 and at most 1"),
            (lambda: Ratio(damping=-1.0), "damping=-1.0"),
            (lambda: SharedRatio(power=-1.0), "power=-1.0 must be finite and at least 0"),
            (lambda: SharedRatio(width=0.0), "width=0.0 must be finite and at least 1e-06"),
            (lambda: UpperHalf(ByLoss()), "ByLoss makes a LossTable, where a rule that makes a table is needed"),
            (lambda: ByLoss(levels=(1.0,)), "levels=.1.0. must be two"),  # type: ignore[arg-type]
            (lambda: ByLoss(levels=(2.0, 1.0)), "must ascend"),
            (lambda: zl.OneCopySGD(lr=-1.0), "lr=-1.0 of the teacher"),
            (lambda: zl.OneCopySGD(clip=0.0), "clip=0.0"),
            (lambda: zl.OneCopySGD(reset_every=0), "reset_every=0"),
            (lambda: zl.MomentumSGD(momentum=1.0), "momentum=1.0"),
            (lambda: zl.ZerothOrder(eps=0.0), "eps=0.0"),
        ],
    )
    def test_arguments(self, make: Callable[[], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    def test_other_spaces(self, tiny_folder: str) -> None:
        class Other(Space):
            def __init__(self, model: Any) -> None:
                super().__init__(model, zl.DenseSpace(model).blocks)

            probe = verify = None  # type: ignore[assignment]

        with pytest.raises(ValueError, match="needs a DenseSpace, not a Other"):
            meta_module(tiny_folder, space=Other).configure_model()

    def test_nothing_to_learn(self, tiny_folder: str) -> None:
        with pytest.raises(ValueError, match="a Uniform has nothing to learn"):
            meta_module(tiny_folder, policy=Uniform()).configure_model()

    def test_checkpoint_of_a_finetuning_run(self, tiny_folder: str, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, 1)
        trainer.fit(make_module(tiny_folder), films(tmp_path))
        trainer.save_checkpoint(tmp_path / "fine.ckpt")
        with pytest.raises(ValueError, match="of a fine-tuning run, not of meta-training"):
            make_trainer(tmp_path, 2).fit(meta_module(tiny_folder), films(tmp_path), ckpt_path=tmp_path / "fine.ckpt", weights_only=True)

    def test_biases_need_rows(self, tiny_folder: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"set data\.calibration_rows above 0"):
            make_trainer(tmp_path, 1).fit(meta_module(tiny_folder, refit_biases_every=1), films(tmp_path, calibration_rows=0))

    def test_a_model_that_reads_weights_elsewhere(self, tiny_folder: str, tmp_path: Path) -> None:
        """A probe can serve it, a differentiable one cannot: said before the first step."""
        folder = tmp_path / "mamba"
        config = AutoConfig.for_model("mamba", **{**CONFIGS["mamba"], "vocab_size": 512})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for path in Path(tiny_folder).glob("tokenizer*"):
            shutil.copy(path, folder)
        with pytest.raises(ValueError, match="this model reads weights outside of their modules' forward"):
            make_trainer(tmp_path, 1).fit(meta_module(str(folder)), films(tmp_path))

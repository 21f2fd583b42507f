"""Meta-training as a LightningModule: learn, once per base model, how to perturb it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn

from zolightning.models import DType
from zolightning.modules.base import OBJECTIVES, ZOModule
from zolightning.modules.gradients import verify_shift
from zolightning.modules.meta_objectives import AfterStep, ClosedForm, MetaObjective, MetaPoint, Verdict
from zolightning.modules.teacher import MomentumSGD, Teacher
from zolightning.objectives import CandidateCrossEntropy, Objective, Reward
from zolightning.policies import BlockInfo, PertNN, Policy
from zolightning.samplers import GaussianSampler, PolicySampler, Sampler
from zolightning.samplers.base import Direction
from zolightning.spaces import DenseSpace, Space

log = logging.getLogger("zolightning")

PolicyOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def plain_sgd(params: Iterable[nn.Parameter], lr: float = 0.1) -> torch.optim.SGD:
    """The published optimizer of the policy.

    Args:
        params: The policy's parameters.
        lr: Learning rate.
    """
    return torch.optim.SGD(params, lr=lr)


class PolicyMetaTrainModule(ZOModule):
    """Learns a perturbation policy for one base model.

    A teacher trains the weights over and over from their pretrained values. At each step of it the policy proposes a scale for every
    block, the meta-objective judges the scales, and the policy learns from the verdict. At the end the run folder holds
    ``policy.safetensors`` and ``sampler.yaml``; the latter is what a fine-tuning run takes as ``--model.sampler``.

    Args:
        pretrained: Hub id or folder of the base model; demo: the small model that comes with the package.
        dtype: Type in which the weights are stored and computed with; ``Trainer.precision`` stays 32-true.
        policy: What is learnt; without it: a small network per block (PertNN), or what the rule makes where the objective is a closed form.
        meta_objective: Judges the scales; without it: the published one, the loss after one zeroth-order step.
        teacher: Moves the weights between two verdicts; without it: the published one, gradient descent with momentum.
        optimizer: Optimizer of the policy, a torch.optim class; called with its parameters.
        sampler: Distribution of the noise, to which the policy gives scales; without it: Gaussian.
        seed: Seed of the directions and of rounding, 0 to 2**64 - 1.
        refresh_every: Steps between two looks of the policy at the weights.
        refit_biases_every: Steps of a task between two fits of candidate biases on its calibration rows, which take the model's
            preference for some answers out of everything that is measured; 0: no biases.
        checkpoint_layers: Keep only the inputs of the decoder layers for a backward and compute their inside twice.
        space: What moves, and how a probe sees it; called with the model.
        objective: The loss that the tasks are trained on; without it: each task's own.
        attn_implementation: Attention code of transformers (``sdpa``, ``eager``, ...).
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> module = PolicyMetaTrainModule("HuggingFaceTB/SmolLM2-135M-Instruct", meta_objective=ExpectedDecrease())
        >>> trainer = lightning.Trainer(max_steps=600)
        >>> trainer.fit(module, TaskDataModule("sst2"))

    References:
        "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv 2510.00419.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: DType = "bfloat16",
        policy: Policy | None = None,
        meta_objective: MetaObjective | None = None,
        teacher: Teacher | None = None,
        optimizer: PolicyOptimizer = plain_sgd,
        sampler: Sampler | None = None,
        seed: int = 0,
        refresh_every: int = 1,
        refit_biases_every: int = 0,
        checkpoint_layers: bool = False,
        space: Callable[[nn.Module], Space] = DenseSpace,
        objective: Objective | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(pretrained, dtype, space, objective, None, attn_implementation, trust_remote_code)
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must be between 0 and 2**64 - 1")
        if isinstance(objective, Reward):
            raise ValueError("a reward has no gradient to learn a policy from: leave objective out, and train on the reward afterwards")
        if refit_biases_every < 0:
            raise ValueError(f"refit_biases_every={refit_biases_every} must not be negative")
        self.meta_objective = meta_objective if meta_objective is not None else AfterStep()
        self.teacher = teacher if teacher is not None else MomentumSGD()
        blank = self.meta_objective.rule.blank() if isinstance(self.meta_objective, ClosedForm) else None
        if blank is not None and policy is not None:
            raise ValueError(f"this closed form makes a {type(blank).__name__} of its own: leave policy={type(policy).__name__} out")
        self._unbound = policy if policy is not None else blank if blank is not None else PertNN()
        self._noise = sampler if sampler is not None else GaussianSampler()
        PolicySampler(self._unbound, self._noise, refresh_every)  # refuses what does not fit
        self.make_optimizer, self.seed, self.refresh_every = optimizer, seed, refresh_every
        self.refit_biases_every, self.checkpoint_layers = refit_biases_every, checkpoint_layers
        self.sampler: PolicySampler | None = None
        self._restored: dict[str, Any] = {}
        self._forwards = 0

    # The model and the policy

    def configure_model(self) -> None:
        """Load the base model and give the policy its blocks."""
        if self.model is not None:
            return
        super().configure_model()
        infos = [BlockInfo.of(block) for block in self.space.blocks]
        self.policy = self._unbound.bind(infos)
        self.policy.base_model = self.pretrained
        if not isinstance(self.space, DenseSpace):
            raise ValueError(
                f"meta-training differentiates the weights themselves: it needs a DenseSpace, not a {type(self.space).__name__}"
            )
        if not any(parameter.requires_grad for parameter in self.policy.parameters()):
            raise ValueError(f"a {type(self.policy).__name__} has nothing to learn")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The policy's optimizer: the only one that Lightning sees, so its steps are the run's."""
        return self.make_optimizer(self.policy.parameters())

    @torch.no_grad()
    def prepare_training(self) -> None:
        """Bind the noise to the weights, on their device, and continue where a checkpoint has left off."""
        super().prepare_training()
        if self.sampler is not None:
            return
        self.sampler = PolicySampler(self.policy, self._noise, self.refresh_every)
        self.sampler.bind(self.space)
        self.sources: list[Any] = list(getattr(self.data, "sources", [self.data]))
        self.objectives = [self._objective_of(source) for source in self.sources]
        if self._restored:
            self._continue(self._restored)
            self._restored = {}

    def _objective_of(self, source: Any) -> Objective:
        kind = OBJECTIVES[str(getattr(source, "objective", "answer"))]
        own = copy.copy(self.objective) if self.objective is not None else kind()  # biases are a task's own
        if hasattr(source, "train_examples"):
            own.prepare(self.tokenizer, source.train_examples)
        return own

    def batch_objective(self) -> Objective:
        """The objective of the coming step's task."""
        return self.objectives[self.steps % len(self.sources)]

    # A step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Judge the policy's scales, let it learn, let the teacher take a step."""
        assert self.sampler is not None
        step, task = self.steps, int(batch.get("task", 0))
        if self.teacher.starts(step):
            self._restore_base()
        self._refit_biases(step, task)
        objective = self.objectives[task]
        self.sampler.refresh(step)
        raw = self.policy(self.sampler.features)
        scales = self.policy.normalise(raw).to(self.space.compute_dtype)
        point = MetaPoint(self.space, objective, batch, self.sampler, self.seed, step, task, self.checkpoint_layers)
        if self._forwards == 0:
            self._check(point, scales.detach())
        verdict = self.meta_objective(point, scales.detach())
        self._learn(scales, verdict)
        if verdict.losses is not None:
            self.sampler.features.observe(verdict.losses, raw.detach())
        loss = self.teacher.step(self.space, objective.on(self.language_model, batch), step, self.seed, self.checkpoint_layers)
        self._forwards += self.forwards_per_step
        self._log(loss, verdict, raw.detach(), scales.detach(), step)
        return loss

    def _learn(self, scales: Tensor, verdict: Verdict) -> None:
        optimizer = cast(Any, self.optimizers())
        optimizer.zero_grad()
        if isinstance(self.meta_objective, ClosedForm):
            solved = self.meta_objective.solve(self.policy.blocks)
            if solved is not None:
                self.policy.load_state_dict(solved.state_dict())
        else:
            usable = torch.isfinite(verdict.gradient).all()
            scales.backward(torch.where(usable, verdict.gradient, 0.0).to(scales))
        optimizer.step()

    def _check(self, point: MetaPoint, scales: Tensor) -> None:
        """Refuse, before the first step, a model or a probe distance that would give wrong numbers."""
        direction = Direction(point.sampler, point.seed, point.step, 0, scales)
        loss = point.objective.on(self.language_model, point.batch)
        if isinstance(self.meta_objective, AfterStep):
            self.space.verify(loss, direction, self.meta_objective.eps)  # is it resolved by the weights?
        verify_shift(self.space, loss, direction, checkpoint=self.checkpoint_layers)

    @torch.no_grad()
    def _restore_base(self) -> None:
        """Back to the pretrained weights, read from disk once more: no copy of them is kept."""
        self.teacher.forget()
        if self.steps:  # at first they are what was loaded
            self.reload_base()

    @torch.no_grad()
    def _refit_biases(self, step: int, task: int) -> None:
        """Fit the task's candidate biases at the present weights, where it is their turn."""
        objective, turn = self.objectives[task], step // len(self.sources)
        if not (self.refit_biases_every and isinstance(objective, CandidateCrossEntropy)):
            return
        if turn % self.refit_biases_every == 0 or objective.biases is None or self.teacher.starts(step):
            fresh = self.fit_candidate_biases(self.sources[task])
            if objective.biases is None:
                objective.biases = fresh
            else:
                objective.biases.copy_(fresh)  # in place: a teacher's captured step reads these

    def _log(self, loss: Tensor, verdict: Verdict, raw: Tensor, scales: Tensor, step: int) -> None:
        self.log("step", float(step + 1))  # Lightning's own count of batches is one behind here
        self.log("train/loss", loss.float())
        self.log("train/meta_loss", verdict.loss.float())
        self.log("train/nu", (scales.norm() / raw.norm()).float())
        self.log("train/spread", (scales.std() / scales.mean()).float())
        self.log("train/teacher_lr", self.teacher.rate(step))
        self.log("train/forwards", float(self._forwards))

    # What the report asks

    @property
    def steps(self) -> int:
        """Steps so far."""
        return int(self.trainer.global_step)

    @property
    def forwards(self) -> int:
        """Loss evaluations so far; those with a backward are counted as one."""
        return self._forwards

    @property
    def forwards_per_step(self) -> int:
        """Loss evaluations of a step."""
        return self.meta_objective.forwards + self.teacher.forwards

    def evaluate(self) -> dict[str, float]:
        """Nothing: a teacher's figures say nothing of a policy."""
        return {}

    # Results and checkpoints

    def on_train_end(self) -> None:
        """Write the policy, the YAML that names it, and what was measured."""
        folder = Path(self.trainer.default_root_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        objective, teacher = type(self.meta_objective).__name__, type(self.teacher).__name__
        tasks = [type(task).__name__ for source in self.sources if (task := getattr(source, "task", None)) is not None]
        if isinstance(self.meta_objective, ClosedForm) and self.meta_objective.solve(self.policy.blocks) is None:
            log.warning("the scales are still equal: %s", self.meta_objective.reason)
        self.policy.trained = {"steps": self.steps, "objective": objective, "teacher": teacher, "tasks": tasks, "seed": self.seed}
        path = self.policy.save_pretrained(folder / "policy.safetensors")
        arguments: dict[str, Any] = {"policy": str(path), "refresh_every": self.refresh_every}
        if type(self._noise) is not GaussianSampler:
            arguments["base"] = f"{type(self._noise).__module__}.{type(self._noise).__qualname__}"
        text = yaml.safe_dump({"class_path": "zolightning.PolicySampler", "init_args": arguments}, sort_keys=False)
        (folder / "sampler.yaml").write_text(text, encoding="utf-8")
        for task, statistics in enumerate(self.meta_objective.statistics()):
            statistics.save(folder / f"statistics_{task}.safetensors")
        print(f"policy       {path}\nsampler      {folder / 'sampler.yaml'}", flush=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Besides weights and policy: the teacher's momentum, what the policy sees, the statistics, the biases."""
        super().on_save_checkpoint(checkpoint)
        assert self.sampler is not None
        biases = [getattr(objective, "biases", None) for objective in self.objectives]
        checkpoint["zolightning"]["meta"] = {
            "forwards": self._forwards, "teacher": self.teacher.state(), "sampler": self.sampler.state(),
            "objective": self.meta_objective.state(), "biases": biases,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back once the weights are on their device.

        Raises:
            ValueError: It is the checkpoint of another model, or not of meta-training.
        """
        super().on_load_checkpoint(checkpoint)
        if "meta" not in checkpoint.get("zolightning", {}):
            raise ValueError("the checkpoint is of a fine-tuning run, not of meta-training")
        self._restored = checkpoint["zolightning"]["meta"]

    def _continue(self, restored: dict[str, Any]) -> None:
        assert self.sampler is not None
        self._forwards = restored["forwards"]
        self.teacher.load_state(self.space, restored["teacher"])
        self.meta_objective.load_state(restored["objective"])
        self.sampler.load_state(restored["sampler"])
        for objective, biases in zip(self.objectives, restored["biases"], strict=True):
            if biases is not None:
                objective.biases = biases.to(self.device)  # type: ignore[attr-defined]

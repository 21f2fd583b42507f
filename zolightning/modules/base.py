"""What both modules share: the model, its tokenizer, evaluation, and checkpoints that hold only what moves."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from zolightning.models import DType, Quantization, load_model, load_tokenizer
from zolightning.modules.evaluation import (
    CALIBRATION,
    EVALUATIONS,
    CandidateEvaluation,
    Context,
    Evaluation,
    LossEvaluation,
    Prediction,
    fitted_biases,
)
from zolightning.objectives import CandidateCrossEntropy, Objective, Reward, TokenCrossEntropy
from zolightning.optim import Replicas
from zolightning.spaces import DenseSpace, Space

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("zolightning")

_FORMAT = 1  # of what a checkpoint holds beside Lightning's own

OBJECTIVES: dict[str, type[Objective]] = {"candidates": CandidateCrossEntropy, "gold": TokenCrossEntropy, "answer": TokenCrossEntropy}


class ZOModule(pl.LightningModule):
    """A causal language model under forward-only training: loading, evaluation and checkpoints.

    Args:
        pretrained: Hub id or folder of the base model; demo: the small model that comes with the package.
        dtype: Type in which the weights are stored and computed with; ``Trainer.precision`` stays 32-true.
        space: What moves, and how a probe sees it; called with the model.
        objective: What is minimised; without it: the task's own (cross-entropy of candidates or of answer tokens).
        micro_batch_size: Examples per forward; without it: the whole batch at once.
        attn_implementation: Attention code of transformers (``sdpa``, ``eager``, ...).
        trust_remote_code: Run Python code that comes with the model.
        quantization: Store the linear maps of the layers in 4 bits (nf4, fp4) or 8 (int8), by bitsandbytes; without it: as they are
            in the files, which may be quantised already.
        double_quantization: Quantise the scales of 4-bit weights too.
    """

    strict_loading = False  # the checkpoint holds only what moves
    replicable = False  # several processes may take a step together

    def __init__(
        self,
        pretrained: str,
        dtype: DType = "bfloat16",
        space: Callable[[nn.Module], Space] = DenseSpace,
        objective: Objective | None = None,
        micro_batch_size: int | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        quantization: Quantization | None = None,
        double_quantization: bool = False,
    ) -> None:
        super().__init__()
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} must be at least 1")
        self.automatic_optimization = False
        self.pretrained, self.dtype_name = pretrained, dtype
        self.make_space = space
        self.objective = objective
        self.micro_batch_size = micro_batch_size
        self.attn_implementation, self.trust_remote_code = attn_implementation, trust_remote_code
        self.quantization, self.double_quantization = quantization, double_quantization
        self.model: nn.Module | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._evaluation: Evaluation = CandidateEvaluation()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the base model."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.pretrained, self.trust_remote_code)
        return self._tokenizer

    @property
    def language_model(self) -> nn.Module:
        """The network, loaded."""
        if self.model is None:
            raise RuntimeError("the model is loaded by configure_model(); call it first")
        return self.model

    def setup(self, stage: str) -> None:
        """Refuse settings that would silently spoil the run."""
        self.check_trainer(self.trainer)

    def check_trainer(self, trainer: pl.Trainer) -> None:
        """What the command asks before the Trainer starts any process.

        Raises:
            ValueError: ``Trainer.precision`` is not 32-true, or there are several processes that would not make one step together.
        """
        name = type(trainer.strategy).__name__
        if trainer.world_size > 1 and not isinstance(getattr(trainer.strategy, "replicas", None), Replicas):
            raise ValueError(
                f"trainer.devices: {trainer.world_size} processes under {name} know nothing of forward-only steps: "
                "set trainer.strategy=zolightning.ReplicaStrategy, or trainer.devices=1"
            )
        if trainer.world_size > 1 and not self.replicable:
            raise ValueError(f"{type(self).__name__} uses one device, trainer.devices asks for {trainer.world_size}: set trainer.devices=1")
        if trainer.precision != "32-true":
            raise ValueError(f"trainer.precision={trainer.precision!r}: keep 32-true and set model.dtype instead (now {self.dtype_name})")

    def configure_model(self) -> None:
        """Load the base model once, onto the device of the run."""
        if self.model is not None:
            return
        # A quantised model is made where it stays: packed weights and their scales do not travel together.
        device = self.trainer.strategy.root_device if self._trainer is not None else self.device
        model = self._load(device)
        self.space = self.make_space(model)
        self.model = self.space.model  # a space may put something around it
        self.model.train()  # Lightning warns of modules in evaluation mode before training; on_train_start sets it

    def _load(self, device: torch.device | str) -> nn.Module:
        return load_model(
            self.pretrained, self.dtype_name, device, self.attn_implementation, self.trust_remote_code, self.quantization,
            self.double_quantization,
        )  # fmt: skip

    def on_train_start(self) -> None:
        """Make ready for the first step."""
        self.prepare_training()

    def prepare_training(self) -> None:
        """Evaluation mode: dropout would differ between the probes of one direction. May be called more than once."""
        self.language_model.eval()

    @property
    def steps(self) -> int:
        """Steps so far."""
        return int(self.trainer.global_step)

    @property
    def forwards(self) -> int:
        """Loss evaluations so far."""
        raise NotImplementedError

    @property
    def forwards_per_step(self) -> int:
        """Loss evaluations of a step."""
        raise NotImplementedError

    @property
    def recorded(self) -> int:
        """How many of the next steps need no forward, because a journal has them."""
        return 0

    @property
    def skipped(self) -> int:
        """Steps that changed nothing because a loss was not finite."""
        return 0

    @property
    def data(self) -> Any:
        """The run's data module, if it has one."""
        return getattr(self.trainer, "datamodule", None)

    def batch_objective(self) -> Objective:
        """The objective of this run: the one given, else the task's."""
        if self.objective is None:
            self.objective = OBJECTIVES[self._task_objective()]()
        return self.objective

    def _task_objective(self) -> str:
        """How the data module's task is trained; data without a task are token sequences to predict."""
        return str(getattr(self.data, "objective", "answer"))

    def start_evaluation(self, split: str = "validation") -> Evaluation:
        """A fresh evaluation of the task's kind.

        Args:
            split: Whose rows: ``validation`` or ``test``.
        """
        task = getattr(self.data, "task", None)
        biases = getattr(self.objective, "biases", None)
        context = Context(biases=biases)
        if task is None and isinstance(self.objective, CandidateCrossEntropy):
            return CandidateEvaluation(context)
        if task is None and not hasattr(self.data, "objective"):
            return LossEvaluation(self.batch_objective())
        if task is not None:
            reward = self.objective if isinstance(self.objective, Reward) else None
            length = reward.max_new_tokens if reward is not None else task.max_new_tokens
            context = Context(getattr(self.data, f"{split}_examples"), self.tokenizer, length, task.metric, biases, reward)
        return EVALUATIONS[self._task_objective()](context)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Figures on the data module's validation rows, outside the Trainer's own loop."""
        self.settle()
        if self.data is None or self.trainer.limit_val_batches == 0 or not is_overridden("val_dataloader", self.data):
            return {}
        evaluation, limit = self.start_evaluation(), self.trainer.limit_val_batches
        loaders = self.data.val_dataloader()
        for loader, batches in enumerate(loaders if isinstance(loaders, list | tuple) else [loaders]):
            count = min(limit, len(batches)) if isinstance(limit, int) else int(limit * len(batches))
            for batch in itertools.islice(batches, count):
                evaluation.update(self.language_model, move_data_to_device(batch, self.device), loader)
        return evaluation.figures()

    def fit_candidate_biases(self, data: Any) -> Tensor:
        """Candidate biases on the calibration rows of a data module, at the present weights.

        Raises:
            ValueError: It has no such rows.
        """
        loaders = data.val_dataloader() if data is not None else []
        if len(loaders) < 2:
            raise ValueError("candidate biases need training rows to fit on: set data.calibration_rows above 0")
        return fitted_biases(self.language_model, loaders[CALIBRATION], self.device)

    def on_validation_epoch_start(self) -> None:
        """Forget the figures of the last pass."""
        self._evaluation = self.start_evaluation()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch; loader 1 holds training rows on which candidate biases are refitted."""
        self._evaluation.update(self.language_model, batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the figures as ``val/...``."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.trainer.global_step))  # Lightning's own count of batches is one behind here
        self.log_dict({f"val/{name}": value for name, value in self._evaluation.figures().items()})

    def on_test_epoch_start(self) -> None:
        """Forget the figures of the last pass."""
        self._evaluation = self.start_evaluation("test")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch."""
        self._evaluation.update(self.language_model, batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the figures as ``test/...``."""
        self.log_dict({f"test/{name}": value for name, value in self._evaluation.figures().items()})

    def on_predict_epoch_start(self) -> None:
        """Forget the figures of the last pass."""
        self._evaluation = self.start_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[Prediction]:
        """One prediction per row: the chosen candidate with probabilities, or the generated answer."""
        return self._evaluation.update(self.language_model, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the blocks that move, under their canonical names; the base is rebuilt from its id."""
        self.settle()
        others = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("model.")}
        checkpoint["state_dict"] = {f"model.{block.name}": block.tensor.detach() for block in self.space.blocks} | others
        settings = self.space.settings
        checkpoint["zolightning"] = {"format": _FORMAT, "pretrained": self.pretrained, "blocks": self._describe(), "space": settings}
        biases = getattr(self.objective, "biases", None)
        if biases is not None:
            checkpoint["zolightning"]["biases"] = biases.tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model before anything is overwritten.

        Raises:
            ValueError: Blocks, shapes, types or the space's settings differ.
        """
        self.configure_model()
        version = checkpoint.get("zolightning", {}).get("format", _FORMAT)
        if version != _FORMAT:
            raise ValueError(f"the checkpoint has format {version}, this version of zolightning reads {_FORMAT}")
        saved = cast(dict[str, str], checkpoint.get("zolightning", {}).get("blocks", {}))
        own = self._describe()
        for name in [*own, *saved]:
            if saved.get(name) != own.get(name):
                there, here = saved.get(name, "missing"), own.get(name, "missing")
                raise ValueError(f"a checkpoint of another model or space: block {name!r} is {there} there and {here} here")
        for name, value in checkpoint["zolightning"].get("space", {}).items():
            if value != self.space.settings[name]:
                raise ValueError(f"the checkpoint's space has {name}={value}, this one {name}={self.space.settings[name]}")
        biases = checkpoint.get("zolightning", {}).get("biases")
        if biases is not None and self.objective is None:
            self.objective = CandidateCrossEntropy(calibrate=True)
        if biases is not None and isinstance(self.objective, CandidateCrossEntropy):
            if self.objective.calibrate:
                self.objective.biases = torch.tensor(biases, dtype=torch.float32, device=self.device)
            else:
                log.warning("calibrate=false: the candidate biases of the checkpoint are left out")
        self.load_blocks(checkpoint["state_dict"])  # Lightning finds parameters only

    def _describe(self) -> dict[str, str]:
        return {block.name: f"{str(block.dtype).removeprefix('torch.')}{list(block.tensor.shape)}" for block in self.space.blocks}

    @torch.no_grad()
    def reload_base(self) -> None:
        """Give the blocks the weights of the base model again, where they lie."""
        self.space.drop()
        # Scales and prefixes come from the quantised base, and have the bits of the device that made them.
        device = self.device if hasattr(self.language_model.config, "quantization_config") else "cpu"
        fresh = self._load(device)
        for block, base in zip(self.space.blocks, self.make_space(fresh).blocks, strict=True):
            block.tensor.copy_(base.tensor)

    def settle(self) -> None:
        """Bring what waits beside the weights into them; called before anything but a probe looks at them."""

    def on_validation_model_eval(self) -> None:
        """Before callbacks and batches."""
        self.settle()
        super().on_validation_model_eval()

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of the weights as they are after the latest step."""
        self.settle()
        state: dict[str, Any] = super().state_dict(*arguments, **options)
        return state

    @torch.no_grad()
    def load_blocks(self, state_dict: dict[str, Tensor]) -> None:
        """Copy the blocks of a checkpoint's ``state_dict`` into the model."""
        self.space.drop()
        for block in self.space.blocks:
            block.tensor.copy_(state_dict[f"model.{block.name}"])

"""One run through the command line, through a user's subclass and through a plain loop: the same weights?

python -m benchmarks.three_ways --pretrained FOLDER --data FOLDER --dtype bfloat16 --steps 300 --out docs/results/three_ways.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import ledger

SUBCLASS = '''
from zolightning import ZOFinetuneModule


class MyModule(ZOFinetuneModule):
    """A user's own module: logs the norm of the first block."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/norm", self.space.blocks[0].tensor.float().norm())
        return loss
'''


def digest(model: nn.Module) -> str:
    """SHA-256 of all parameters."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def through_cli(class_path: str, options: argparse.Namespace, folder: str) -> str:
    """``zolightning fit``."""
    from zolightning.cli import main

    cli = main([
        "fit", "--model", class_path, "--model.pretrained", options.pretrained, "--model.dtype", options.dtype,
        f"--model.optimizer={json.dumps({'lr': options.lr, 'eps': options.eps})}",
        "--data", "zolightning.TaskDataModule", "--data.task", "sst2", "--data.train_file", f"{options.data}/sst2/train.jsonl.gz",
        "--data.validation_file", f"{options.data}/sst2/validation.jsonl", "--data.max_length", "256", "--data.num_train", "1000",
        "--trainer.max_steps", str(options.steps), "--trainer.limit_val_batches", "0", "--trainer.default_root_dir", folder,
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    ])  # fmt: skip
    return digest(cli.model.language_model)


def through_loop(options: argparse.Namespace) -> str:
    """``ZOOptimizer`` and nothing else."""
    from zolightning import CandidateCrossEntropy, DenseSpace, TaskDataModule, ZOOptimizer
    from zolightning.models import load_model, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(options.pretrained, options.dtype, device)
    data = TaskDataModule(
        "sst2", f"{options.data}/sst2/train.jsonl.gz", f"{options.data}/sst2/validation.jsonl",
        tokenizer=load_tokenizer(options.pretrained), max_length=256, num_train=1000,
    )  # fmt: skip
    data.setup("fit")
    optimizer = ZOOptimizer(DenseSpace(model), lr=options.lr, eps=options.eps)
    objective = CandidateCrossEntropy()
    for step in range(options.steps):
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in data.train_batch(step).items()}
        optimizer.step(objective.on(model, batch))
    return digest(model)


def compare(options: argparse.Namespace) -> dict[str, str]:
    """The digest of the trained weights by each way, and of the untrained ones."""
    from zolightning.models import load_model

    digests = {"untrained": digest(load_model(options.pretrained, options.dtype)), "plain loop": through_loop(options)}
    sys.argv = sys.argv[:1]  # Lightning warns where it finds arguments of its own and of the process
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "my_module.py").write_text(SUBCLASS, encoding="utf-8")
        sys.path.insert(0, folder)
        digests["command line"] = through_cli("zolightning.ZOFinetuneModule", options, folder + "/cli")
        digests["user's subclass"] = through_cli("my_module.MyModule", options, folder + "/subclass")
    return digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    digests = compare(options)
    same = len({value for key, value in digests.items() if key != "untrained"}) == 1 and digests["untrained"] != digests["plain loop"]
    result = {"same": same, "digests": digests, "steps": options.steps, "dtype": options.dtype, "lr": options.lr, "eps": options.eps}
    result |= ledger.made_by()
    if options.out:
        ledger.write(options.out, result)
    print(json.dumps(result, indent=1))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()

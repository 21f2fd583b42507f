"""A derived checkpoint: the base model, fine-tuned a little with first-order Adam.

    python -m benchmarks.derive --pretrained FOLDER --task squad --train-file squad/train.jsonl.gz --out runs/derived

The same file of a policy must serve it unchanged. Prints the digest of the weights, which ``benchmarks/grids/policy_reuse.yaml`` has in the
model's name, so that runs on another checkpoint do not mix with these.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import nn

from benchmarks.methods import adam
from benchmarks.runs import task_data, to_device
from zolightning.models import load_model, resolve
from zolightning.modules.base import OBJECTIVES


def digest(model: nn.Module) -> str:
    """First 8 digits of the SHA-256 of all weights."""
    total = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        total.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:8]


def main(options: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder or hub id of the base model")
    parser.add_argument("--task", default="squad", help="short name of the task")
    parser.add_argument("--train-file", required=True, help="its training rows")
    parser.add_argument("--steps", type=int, default=200, help="steps of 16 rows")
    parser.add_argument("--lr", type=float, default=1e-5, help="of Adam")
    parser.add_argument("--max-length", type=int, default=256, help="tokens a row")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and order of the rows")
    parser.add_argument("--out", type=Path, default=Path("runs/derived"), help="folder for the model and its tokenizer")
    arguments = parser.parse_args(options)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # the same checkpoint next time, where the device allows it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = {"task": arguments.task, "train_file": arguments.train_file, "batch_size": 16, "max_length": arguments.max_length}
    data = task_data(yaml.safe_dump(task | {"num_validation": 16}), arguments.seed, resolve(arguments.pretrained))
    model = load_model(arguments.pretrained, "float32", device)
    stepper, objective = adam(model, arguments.lr, arguments.seed), OBJECTIVES[data.objective]()
    for step in range(arguments.steps):
        loss = stepper.step(objective.on(model, to_device(data.train_batch(step), device)))
        if step % 50 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {float(loss):.4f}", flush=True)
    torch.use_deterministic_algorithms(False)
    name = digest(model)
    model.save_pretrained(arguments.out)
    data.tokenizer.save_pretrained(arguments.out)
    (arguments.out / "digest.txt").write_text(name, encoding="utf-8")
    print(f"{arguments.out}: {name}")
    return name


if __name__ == "__main__":
    main()

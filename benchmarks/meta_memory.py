"""Memory and time of meta-training with one copy of the weights, against a plain forward and backward with frozen weights.

    python -m benchmarks.meta_memory --shape llama-3.1-8b --rows 16 --length 256 --steps 5

A meta-step is the published verdict (two probes, a backward at the shifted point) and a step of the teacher inside the backward.
``activations`` is the peak of a plain forward and backward in which only the embedding's output needs a gradient, same batch and
checkpointing, minus the weights; ``bar`` is weights + activations + 5 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ledger, shapes
from zolightning import AfterStep, DenseSpace, OneCopySGD, PolicySampler
from zolightning.modules.checkpointing import checkpointed
from zolightning.modules.meta_objectives import MetaPoint
from zolightning.objectives import TokenCrossEntropy
from zolightning.policies import PertNN


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = shapes.make(arguments.shape, getattr(torch, arguments.dtype), device)
    batch: dict[str, Any] = shapes.batch(model, arguments.rows, arguments.length, device)
    batch |= {"scored": torch.full((arguments.rows,), 3, device=device), "max_scored": 3}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    loss = TokenCrossEntropy().on(model, batch)
    plain = peak(lambda: frozen(model, loss))
    activations = max(plain - weights, 0)
    space, teacher, judge = DenseSpace(model), OneCopySGD(1e-4), AfterStep()
    sampler = PolicySampler(PertNN())
    sampler.bind(space)
    seconds: list[float] = []

    def step(number: int) -> None:
        start = time.perf_counter()
        scales = sampler.policy.normalise(sampler.policy(sampler.features))
        verdict = judge(MetaPoint(space, loss.objective, batch, sampler, 0, number, 0, True), scales.detach())
        scales.backward(verdict.gradient.to(scales))
        float(teacher.step(space, loss, number, 0, True))
        seconds.append(time.perf_counter() - start)

    step(0)  # compiles the kernels

    def several() -> None:
        for number in range(1, arguments.steps + 1):
            step(number)

    meta = peak(several)
    bar = 1.05 * (weights + activations)
    row = {"shape": arguments.shape, "dtype": arguments.dtype, "rows": arguments.rows, "length": arguments.length}
    row |= {"weights": weights, "activations": activations, "peak": meta, "bar": round(bar), "within": meta <= bar}
    row |= {"seconds_per_step": round(sum(seconds[1:]) / max(len(seconds) - 1, 1), 3)}
    row |= ledger.made_by()
    print(json.dumps(row))
    if arguments.output is not None:
        ledger.append(arguments.output, row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a name of benchmarks.shapes")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--rows", type=int, default=16, help="rows a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--steps", type=int, default=5, help="meta-steps")
    parser.add_argument("--output", type=Path, help="ledger to append the row to")
    return parser.parse_args()


def frozen(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """A forward and backward through checkpointed layers, without gradients of weights."""
    required = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        with checkpointed(model):
            loss().backward()
    finally:
        handle.remove()
        for parameter in required:
            parameter.requires_grad_(True)


def peak(run: Callable[[], Any]) -> int:
    """Most bytes that were allocated on the GPU meanwhile; 0 on a CPU."""
    if not torch.cuda.is_available():
        run()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()

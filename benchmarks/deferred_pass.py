"""Does it pay to fold the update of a step into the perturbation of the next one?

    python -m benchmarks.deferred_pass --out docs/results/deferred_pass.json

Two passes (update, then ``W + a z`` and ``W - a z``) read the weights twice; one pass that does both reads them once, and draws as much
noise. Both are timed over one matrix of an 8B model, in the order of a step, as captured graphs; figures are for 8 billion weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ledger
from benchmarks.step_time import milliseconds
from zolightning.kernels import fused
from zolightning.noise import GaussianNoise, Key, Noise, RademacherNoise

SHAPE = (14336, 4096)
BILLION = 1e9
KINDS: dict[str, type[Noise]] = {"gaussian": GaussianNoise, "rademacher": RademacherNoise}


def one_pass(table: fused.Table, moves: Tensor, amounts: Tensor, noise: Noise, clock: Tensor) -> Tensor:
    """The update of step ``clock`` and both signs of the next step."""
    no, yes = torch.zeros((), device=table.device), torch.ones((), dtype=torch.bool, device=table.device)
    return fused.advance(table, moves, no, yes, clock, amounts, noise, clock + 1, 2)[0]


def two_passes(table: fused.Table, moves: Tensor, amounts: Tensor, noise: Noise, clock: Tensor) -> Tensor:
    """The same one after the other."""
    no, yes = torch.zeros((), device=table.device), torch.ones((), dtype=torch.bool, device=table.device)
    fused.update(table, moves[None], [noise], no, yes, clock)
    return fused.materialise(table, amounts, noise, clock + 1, 2)[0]


def measure(kind: str, dtype: torch.dtype, shape: tuple[int, int] = SHAPE) -> ledger.Row:
    """Milliseconds for 8 billion weights."""
    device = torch.device("cuda")
    weight, noise = (torch.randn(shape, device=device) * 0.02).to(dtype), KINDS[kind](Key(3, 77, 5))
    clock, table = torch.tensor(5, device=device), fused.Table([weight], [77], [0], [0])
    moves, amounts = torch.full((1,), 1e-6, device=device), torch.full((1,), 1e-3, device=device)

    def captured(run: Any) -> float:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(4):
                run()
        return milliseconds(graph.replay, 30) / 4 / weight.numel() * 8 * BILLION

    together = captured(lambda: one_pass(table, moves, amounts, noise, clock))
    apart = captured(lambda: two_passes(table, moves, amounts, noise, clock))
    return {"noise": kind, "dtype": str(dtype).removeprefix("torch."), "two_passes_ms": apart, "one_pass_ms": together}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/deferred_pass.json"), help="result file")
    arguments = parser.parse_args()
    rows = []
    for kind in KINDS:
        for dtype in (torch.bfloat16, torch.float16):
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in measure(kind, dtype).items()})
            print(rows[-1], flush=True)
    ledger.write(arguments.out, {"command": ledger.command("deferred_pass"), **ledger.made_by(), "shape": SHAPE, "rows": rows})


if __name__ == "__main__":
    main()

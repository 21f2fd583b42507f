"""How far does the in-place walk move the weights when nothing is learned?

    python -m benchmarks.drift

Weights N(0, 0.02), 1,000 steps with a constant loss (so every update is zero): root mean square of the drift over that of the weights.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.textbook import Textbook
from zolightning import DenseSpace, ZOOptimizer


def drift(dtype: torch.dtype, textbook: bool, steps: int = 1000) -> float:
    """Relative drift after ``steps`` steps of the textbook loop, or of ours."""
    torch.manual_seed(0)
    net = nn.Linear(256, 256, bias=False)
    nn.init.normal_(net.weight, std=0.02)
    net = net.to(dtype).eval()
    before, x = net.weight.detach().clone().double(), torch.ones(1, 256, dtype=dtype)
    stepper = Textbook(net, lr=1e-6) if textbook else ZOOptimizer(DenseSpace(net), lr=1e-6)
    for _ in range(steps):
        stepper.step(lambda: net(x).float().sum() * 0.0)
    return float((net.weight.detach().double() - before).norm() / before.norm())


def main() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        print(f"{name:10s} in place {drift(dtype, True):.2e}   read-only {drift(dtype, False):.2e}")


if __name__ == "__main__":
    main()

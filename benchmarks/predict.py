r"""What the statistics predict of policies on tasks that they were not made from, before any run.

    python -m benchmarks.predict --statistics docs/results/policy/statistics.jsonl --pretrained FOLDER --policies runs/policy/policies

With :math:`p_i = \sigma_i^2` the best step lowers the loss by about
:math:`(\sum_i p_i G_i)^2 / (2 \sum_i p_i M_i \sum_i p_i F_i)`, and ``M`` is mostly ``F`` over the batch size. So what counts is
:math:`\rho = \sum_i p_i G_i / \sum_i p_i F_i`, the signal for a unit of noise; the decrease goes with its square. Shown is the mean over
places of :math:`\log (\rho + 1/N)`, less that of equal scales: ``N`` rows do not tell ratios below :math:`1/N` from zero. Both sums are
taken without the preference for some answers (zolightning.modules.prior), of policies in the folder ``without_TASK`` of
benchmarks.make_policies. A prediction for the first steps, not a result: it knows nothing of how soon a gradient is used up.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.collect_statistics import load
from zolightning import DenseSpace
from zolightning.models import load_model
from zolightning.modules.statistics import BlockStatistics
from zolightning.policies import BlockInfo, Features, Policy, load_policy, settled


def gain(policy: Policy, features: Features, places: Sequence[BlockStatistics]) -> float:
    """Mean logarithm of a policy's ratio of signal to noise over that of equal scales."""

    def scales(loss: float) -> Tensor:
        typical = copy.deepcopy(features)
        typical.losses.fill_(loss)
        return policy.normalise(settled(policy, typical)).double().square()

    def ratio(p: Tensor, of: BlockStatistics) -> float:
        return max(float((p * of.gradient).sum() / (p * of.fisher).sum()), -0.5 / of.rows) + 1 / of.rows

    return statistics.fmean(math.log(ratio(scales(of.loss), of) / ratio(torch.ones_like(of.fisher), of)) for of in places)


def main(options: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statistics", type=Path, required=True, help="ledger of benchmarks.collect_statistics")
    parser.add_argument("--pretrained", required=True, help="the model")
    parser.add_argument("--policies", type=Path, required=True, help="folder of benchmarks.make_policies, made with --leave-out")
    arguments = parser.parse_args(options)
    space = DenseSpace(load_model(arguments.pretrained, "bfloat16"))
    blocks = [BlockInfo(block.name, tuple(block.tensor.shape)) for block in space.blocks]
    features = Features(blocks)
    features.measure(block.tensor for block in space.blocks)
    found: dict[str, dict[str, float]] = {}
    measured = load(arguments.statistics, "without_prior")
    tasks = [task for task in dict.fromkeys(task for task, _ in measured) if (arguments.policies / f"without_{task}").is_dir()]
    for task in tasks:
        places = [value for (name, _), value in measured.items() if name == task]
        for path in sorted((arguments.policies / f"without_{task}").glob("*.safetensors")):
            found.setdefault(path.stem, {})[task] = gain(load_policy(str(path)).bind(blocks), features, places)
    print("| log gain of G/F | " + " | ".join(tasks) + " | mean |\n|---|" + "---|" * (len(tasks) + 1))
    for name, by_task in sorted(found.items(), key=lambda item: -sum(item[1].values())):
        values = [by_task[task] for task in tasks]
        print(f"| {name} | " + " | ".join(f"{value:+.2f}" for value in [*values, sum(values) / len(values)]) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

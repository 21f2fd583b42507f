r"""The policies that a comparison needs, made from statistics of the blocks.

    python -m benchmarks.make_policies --statistics runs/statistics/statistics.jsonl --pretrained FOLDER --out runs/policies

Controls: ``uniform``, ``untrained`` (the published network before its training), ``upper_half`` of the layers, ``closed_form``
(:math:`\sigma_i^2 \propto G_i / F_i`). Candidates: ``power_2``, ``power_3`` (that ratio to a power: more concentrated), ``upper_ratio``
(the ratio in the upper half alone), ``decrease`` (the largest expected decrease of a step). Beside them ``curvature.json`` has every
block's share of :math:`\sum_i F_i`, in which ``benchmarks.methods.policy`` measures learning rates.

Tasks and places are averaged after each was divided by its own :math:`\sum_i F_i`, so that one with little signal says little.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.collect_statistics import load
from zolightning import DenseSpace
from zolightning.models import load_model
from zolightning.modules.statistics import BlockStatistics, mean_statistics
from zolightning.policies import BlockInfo, Policy, Table, controls


def pool(several: list[BlockStatistics]) -> BlockStatistics:
    """Their mean, each in units of its own total curvature."""
    scaled = []
    for one in several:
        unit = float(one.fisher.sum())
        scaled.append(replace(one, gradient=one.gradient / unit, batch=one.batch / unit, fisher=one.fisher / unit))
    return mean_statistics(scaled)


def policies(blocks: list[BlockInfo], statistics: BlockStatistics) -> dict[str, Policy]:
    """All of them by name."""
    upper = controls.upper_half(blocks)
    closed = controls.closed_form(blocks, statistics.by_name("gradient"), statistics.by_name("fisher"))
    ratio = closed.values.detach().double().square()

    def table(multipliers: Tensor) -> Table:
        return Table.of(blocks, (multipliers / multipliers.max()).sqrt().float())

    return {
        "uniform": controls.uniform(), "untrained": controls.untrained(), "upper_half": upper, "closed_form": closed,
        "power_2": table(ratio**2), "power_3": table(ratio**3), "upper_ratio": table(ratio * upper.values.detach().double()),
        "decrease": table(statistics.decrease_scales().square()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statistics", type=Path, required=True, help="ledger of benchmarks.collect_statistics")
    parser.add_argument("--pretrained", required=True, help="the model: its blocks' shapes")
    parser.add_argument("--tasks", help="tasks to use, by commas; without it all of the ledger")
    parser.add_argument("--out", type=Path, default=Path("runs/policies"), help="folder for the files")
    arguments = parser.parse_args()
    found = load(arguments.statistics)
    wanted = arguments.tasks.split(",") if arguments.tasks else sorted({task for task, _ in found})
    statistics = pool([value for (task, _), value in found.items() if task in wanted])
    space = DenseSpace(load_model(arguments.pretrained, "bfloat16"))
    blocks = [BlockInfo.of(block) for block in space.blocks]
    shares = statistics.by_name("fisher")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "curvature.json").write_text(json.dumps(shares), encoding="utf-8")
    for name, policy in policies(blocks, statistics).items():
        bound = policy.bind(blocks)
        bound.base_model = Path(arguments.pretrained).name
        bound.trained = {"statistics": str(arguments.statistics), "tasks": wanted, "rule": name}
        bound.save_pretrained(arguments.out / f"{name}.safetensors")
    print(f"{len(blocks)} blocks, {statistics.rows} rows of {', '.join(wanted)}: {arguments.out}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

r"""The policies that a comparison needs, made from statistics of the blocks.

    python -m benchmarks.make_policies --statistics runs/statistics/statistics.jsonl --pretrained FOLDER --out runs/policies --leave-out

Controls: ``uniform``, ``untrained`` (the published network before its training), ``upper_half`` of the layers, ``closed_form``
(:math:`\sigma_i^2 \propto \rho_i = G_i / F_i`).

Candidates from the same statistics: ``power_2``, ``power_3`` (that ratio to a power: more concentrated), ``upper_ratio`` (the ratio in the
upper half alone), ``decrease`` (the largest expected decrease of a step).

Candidates from statistics without the preference for some answers (zolightning.modules.prior): ``free_1``, ``free_2`` (that ratio, to a
power), ``free_upper`` (in the upper half alone), ``element`` (:math:`\sigma_i^2 \propto \sqrt{d_i / F_i}` with :math:`d_i` elements:
what a step of Adam has in common for a block), ``horizon_10``, ``horizon_100`` (the largest expected decrease over a horizon of steps: a
block's gain ends when its gradient is used up, so longer horizons spread the scales).

Candidates in which the ratio is learnt over the tasks, as a function of the block's features and a number of its own, shrunk as much as
predicts a task best from the others (benchmarks.block_model): ``learned_2``, ``learned_4`` (to a power), ``learned_horizon_10``,
``learned_horizon_30``, ``learned_horizon_100`` (the largest decrease by these ratios).

Beside them ``curvature.json`` has every block's share of :math:`\sum_i F_i`, in which ``benchmarks.methods.policy`` measures rates.
With ``--leave-out`` the folders ``without_TASK`` have the same from all other tasks: what a policy is worth on a task that it has not seen.

Tasks and places are averaged after each was divided by its own :math:`\sum_i F_i`, so that one with little signal says little.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import block_model
from benchmarks.block_model import BlockModel
from benchmarks.collect_statistics import load
from zolightning import DenseSpace
from zolightning.models import load_model
from zolightning.modules.statistics import BlockStatistics, mean_statistics
from zolightning.policies import BlockInfo, FeaturePolicy, Features, Policy, Table, controls

_LEAST = 1e-3  # signal for curvature where the sum over all blocks is lost in noise


@dataclass(frozen=True)
class Sources:
    """What policies are made from.

    Args:
        blocks: Of the model.
        features: What policies see of them, from the pretrained weights.
        whole: Statistics as the objective has them, pooled.
        free: Statistics without the preference for some answers, pooled.
        ratios: Of those, ``G / F`` by task: float64, ``[tasks, blocks]``.
    """

    blocks: list[BlockInfo]
    features: Features
    whole: BlockStatistics
    free: BlockStatistics
    ratios: Tensor


def pool(several: list[BlockStatistics]) -> BlockStatistics:
    """Their mean, each in units of its own total curvature."""
    scaled = []
    for one in several:
        unit = float(one.fisher.sum())
        scaled.append(replace(one, gradient=one.gradient / unit, batch=one.batch / unit, fisher=one.fisher / unit))
    return mean_statistics(scaled)


def sources(statistics: Path, tasks: Sequence[str], blocks: list[BlockInfo], features: Features) -> Sources:
    """Read and pool the statistics of some tasks."""
    whole, free = load(statistics), load(statistics, "without_prior")
    by_task = [pool([value for (task, _), value in free.items() if task == wanted]) for wanted in tasks]
    ratios = torch.stack([one.gradient.double() / one.fisher.double().clamp_min(1e-30) for one in by_task])
    return Sources(blocks, features, pool([value for (task, _), value in whole.items() if task in tasks]), pool(by_task), ratios)


def policies(given: Sources) -> dict[str, Policy]:
    """All of them by name."""
    upper = controls.upper_half(given.blocks)
    closed = controls.closed_form(given.blocks, given.whole.by_name("gradient"), given.whole.by_name("fisher"))
    ratio, above = closed.values.detach().double().square(), upper.values.detach().double()
    fisher = given.free.fisher.double().clamp_min(1e-30)
    free = (given.free.gradient.double() / fisher).clamp_min(0.0)
    element = (torch.tensor([block.numel for block in given.blocks], dtype=torch.float64) / fisher).sqrt()
    x = given.features.standard().double()
    x[:, -2:] = 0.0  # loss and progress: the statistics do not tell them apart
    model = block_model.learn(given.ratios, x)
    signal = max(float(given.free.gradient.sum()), _LEAST * float(fisher.sum()))
    smooth = replace(given.free, gradient=fisher * model.ratios * signal / (fisher * model.ratios).sum())

    def table(multipliers: Tensor) -> Table:
        return Table.of(given.blocks, (multipliers / multipliers.max()).sqrt().float())

    def horizon(statistics: BlockStatistics, steps: float) -> Table:
        return table(statistics.decrease_scales(steps).square())  # what one step loses along the gradient, so many times over

    return {
        "uniform": controls.uniform(), "untrained": controls.untrained(), "upper_half": upper, "closed_form": closed,
        "power_2": table(ratio**2), "power_3": table(ratio**3), "upper_ratio": table(ratio * above),
        "decrease": table(given.whole.decrease_scales().square()),
        "free_1": table(free), "free_2": table(free**2), "free_upper": table(free * above), "element": table(element),
        "horizon_10": horizon(given.free, 10), "horizon_100": horizon(given.free, 100),
        "learned_2": learned(given.blocks, x, model, 2), "learned_4": learned(given.blocks, x, model, 4),
        "learned_horizon_10": horizon(smooth, 10), "learned_horizon_30": horizon(smooth, 30), "learned_horizon_100": horizon(smooth, 100),
    }  # fmt: skip


def learned(blocks: list[BlockInfo], features: Tensor, model: BlockModel, power: float) -> FeaturePolicy:
    """The learnt ratios to a power: what is a function of the features carries over to other models, the rest to derived ones."""
    policy = FeaturePolicy(hidden=0, offset=True).bind(blocks)
    own = model.ratios.log() - features @ model.weights
    with torch.no_grad():
        policy.weight_out.copy_((power / 2 * model.weights).float())
        policy.offsets.copy_((power / 2 * own).float())
    policy.trained = {"ridge": model.ridge, "share": model.share}
    return policy


def write(folder: Path, given: Sources, about: dict[str, Any]) -> None:
    """All policies of one set of tasks, and the shares of curvature."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, policy in policies(given).items():
        bound = policy.bind(given.blocks)
        bound.base_model, bound.trained = about["base_model"], {**about["trained"], **policy.trained, "rule": name}
        bound.save_pretrained(folder / f"{name}.safetensors")
    (folder / "curvature.json").write_text(
        json.dumps(given.whole.by_name("fisher")), encoding="utf-8"
    )  # last: its presence says that the folder is whole


def main(options: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statistics", type=Path, required=True, help="ledger of benchmarks.collect_statistics")
    parser.add_argument("--pretrained", required=True, help="the model: its blocks' shapes and weights")
    parser.add_argument("--tasks", help="tasks to use, by commas; without it all of the ledger")
    parser.add_argument("--leave-out", action="store_true", help="also a folder for each task, made without it")
    parser.add_argument("--out", type=Path, default=Path("runs/policies"), help="folder for the files")
    arguments = parser.parse_args(options)
    wanted = arguments.tasks.split(",") if arguments.tasks else list(dict.fromkeys(task for task, _ in load(arguments.statistics)))
    space = DenseSpace(load_model(arguments.pretrained, "bfloat16"))
    blocks = [BlockInfo.of(block) for block in space.blocks]
    features = Features(blocks)
    features.measure(block.tensor for block in space.blocks)
    sets = {"": wanted}
    if arguments.leave_out:
        sets |= {f"without_{task}": [other for other in wanted if other != task] for task in wanted}
    for name, tasks in sets.items():
        given = sources(arguments.statistics, tasks, blocks, features)
        about = {"base_model": Path(arguments.pretrained).name, "trained": {"statistics": arguments.statistics.name, "tasks": tasks}}
        write(arguments.out / name, given, about)
        print(f"{len(blocks)} blocks, {given.whole.rows} rows of {', '.join(tasks)}: {arguments.out / name}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

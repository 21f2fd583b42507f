r"""The policies that a comparison needs, made from statistics of the blocks.

    python -m benchmarks.make_policies --statistics runs/statistics/statistics.jsonl --pretrained FOLDER --out runs/policies --leave-out

Controls: ``uniform``, ``untrained`` (the published network before its training), ``upper_half`` of the layers, ``closed_form``
(:math:`\sigma_i^2 \propto \rho_i = G_i / F_i`).

Candidates: ``upper_ratio`` (that ratio in the upper half alone); ``shared_3``, ``shared_4``: the ratio that all tasks and places
share (zolightning.policies.shared), to a power, from statistics without the preference for some answers (zolightning.modules.prior).
``by_loss_1``, ``by_loss_2``, ``by_loss_3`` are ``upper_ratio`` while the loss is below 0.8 and, above 1.2, the shared ratio of the places
where it was as high, to a power; equal scales if there was none.

Beside them ``curvature.json`` has every block's share of :math:`\sum_i F_i`, in which ``benchmarks.methods.policy`` measures rates.
With ``--leave-out`` the folders ``without_TASK`` have the same from all other tasks: what a policy is worth on a task that it has not seen.

The rules are those of zolightning.modules.scale_rules.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.collect_statistics import load
from zolightning import DenseSpace
from zolightning.models import load_model
from zolightning.modules import BlockStatistics, ByLoss, Ratio, SharedRatio, UpperHalf
from zolightning.modules.statistics import mean_statistics
from zolightning.policies import BlockInfo, Policy, controls


@dataclass(frozen=True)
class Sources:
    """What policies are made from.

    Args:
        blocks: Of the model.
        whole: Statistics as the objective has them, one of each task and place.
        free: The same without the preference for some answers.
    """

    blocks: list[BlockInfo]
    whole: list[BlockStatistics]
    free: list[BlockStatistics]

    @property
    def pooled(self) -> BlockStatistics:
        """The mean of ``whole``, each place in units of its own curvature."""
        return mean_statistics(self.whole, normalise=True)


def sources(statistics: Path, tasks: Sequence[str], blocks: list[BlockInfo]) -> Sources:
    """Read the statistics of some tasks."""

    def of(kind: str) -> list[BlockStatistics]:
        return [value for (task, _), value in load(statistics, kind).items() if task in tasks]

    return Sources(blocks, of("blocks"), of("without_prior"))


def policies(given: Sources) -> dict[str, Policy]:
    """All of them by name."""
    return {
        "uniform": controls.uniform(), "untrained": controls.untrained(), "upper_half": controls.upper_half(given.blocks),
        "closed_form": Ratio()(given.blocks, given.whole), "upper_ratio": UpperHalf()(given.blocks, given.whole),
        **{f"by_loss_{power}": ByLoss(above=SharedRatio(power))(given.blocks, given.whole) for power in (1, 2, 3)},
        **{f"shared_{power}": SharedRatio(power)(given.blocks, given.free) for power in (3, 4)},
    }  # fmt: skip


def write(folder: Path, given: Sources, about: dict[str, Any]) -> None:
    """All policies of one set of tasks, and the shares of curvature."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, policy in policies(given).items():
        bound = policy.bind(given.blocks)
        bound.base_model, bound.trained = about["base_model"], {**about["trained"], **policy.trained, "rule": name}
        bound.save_pretrained(folder / f"{name}.safetensors")
    (folder / "curvature.json").write_text(
        json.dumps(given.pooled.by_name("fisher")), encoding="utf-8"
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
    sets = {"": wanted}
    if arguments.leave_out:
        sets |= {f"without_{task}": [other for other in wanted if other != task] for task in wanted}
    for name, tasks in sets.items():
        given = sources(arguments.statistics, tasks, blocks)
        about = {"base_model": Path(arguments.pretrained).name, "trained": {"statistics": arguments.statistics.name, "tasks": tasks}}
        write(arguments.out / name, given, about)
        print(f"{len(blocks)} blocks, {given.pooled.rows} rows of {', '.join(tasks)}: {arguments.out / name}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

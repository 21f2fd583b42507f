"""Which candidate becomes ours, by the design tasks alone.

    python -m benchmarks.choose benchmarks/grids/policy_design.yaml --policies runs/policies --out docs/results/policy

In that grid every policy was made without the task that it is tried on. The candidate is chosen whose smallest mean loss reduction, over
all other methods and over raw and bias-corrected figures, is the largest; tasks without headroom do not count. ``ours.safetensors`` is
then the candidate made from all design tasks, ``chosen.json`` says why. Commit both before any other task is looked at.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import grid, ledger, verdict
from benchmarks.compare import planned_pairs
from benchmarks.headroom import headroom
from benchmarks.plan import Plan


def scores(config: dict[str, Any], rows: list[ledger.Row]) -> dict[str, dict[str, float]]:
    """For each candidate that has run on all counted tasks: the smaller of its raw and corrected mean reduction, by other method."""
    found, ended = headroom(rows), verdict.curves(rows)
    counted = [task for task in config["tasks"] if task in found and found[task].there]
    controls = [name for name, settings in config["methods"].items() if not settings.get("candidate") and not settings.get("first")]
    out: dict[str, dict[str, float]] = {}
    for name, settings in config["methods"].items():
        if not settings.get("candidate") or name not in ended:
            continue
        against = {}
        for control in controls:
            pairs = planned_pairs([config], name, control, counted)
            both = [verdict.compare(ended[name], ended.get(control, {}), pairs, kind) for kind in verdict.KINDS]
            if not any(one.missing for one in both):
                against[control] = min((one.reduction if not math.isnan(one.reduction) else -math.inf) for one in both)
        if counted and len(against) == len(controls):
            out[name] = against
    return out


def main(options: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--ledger", type=Path, help="another ledger than the grid's")
    parser.add_argument("--policies", type=Path, default=Path("runs/policies"), help="folder of benchmarks.make_policies")
    parser.add_argument("--out", type=Path, required=True, help="folder for chosen.json and ours.safetensors")
    arguments = parser.parse_args(options)
    config = grid.load(arguments.grid, arguments.ledger)
    found = scores(config, Plan(config).current())
    if not found:
        sys.exit("no candidate has run on all design tasks with headroom, together with all other methods")
    ranked = sorted(found, key=lambda name: min(found[name].values()), reverse=True)
    for name in ranked:
        print(f"{name:16s} worst {min(found[name].values()):+.4f}  " + "  ".join(f"{k} {v:+.4f}" for k, v in found[name].items()))
    best = ranked[0]
    content = {"policy": best, "tasks": list(config["tasks"]), "beats_each": min(found[best].values()) > 0, "scores": found,
               "grid": arguments.grid.name, "commit": ledger.commit()}  # fmt: skip
    shutil.copy(arguments.policies / f"{best}.safetensors", arguments.out / "ours.safetensors")
    (arguments.out / "chosen.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"ours: {best}" + ("" if content["beats_each"] else ", which does not beat every other method on the design tasks"))


if __name__ == "__main__":
    main()

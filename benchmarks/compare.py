"""The verdict on a learned policy: a grid's ledger against what the policy has to show.

    python -m benchmarks.compare benchmarks/grids/policy_rest.yaml --chosen docs/results/policy/chosen.json --out docs/results/policy.json

Only tasks count on which first-order Adam shows headroom (benchmarks.headroom) and on which the policy was not trained. Against each other
method: mean relative reduction of the loss with a 95 % bootstrap interval over tasks and seeds, and wins; against ``uniform`` also the gain
in the metric and the share of the forwards that ours takes to uniform's final loss. All of it raw and bias-corrected. Runs that are planned
and not there are named, and what lacks them does not hold.

``policy.json`` gets ``rows`` (every run's end), ``points`` (on the way), ``headroom`` and ``verdict``; beside it a table and a picture.
Several grids may be given: rows of all are kept, pairs are planned by all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import grid, ledger, verdict
from benchmarks.headroom import Headroom, headroom
from benchmarks.plan import Plan
from benchmarks.verdict import KINDS, Comparison, Pair

GAIN, SHARE = 2.5, 0.5  # points of the metric, share of the forwards


def planned_pairs(configs: list[dict[str, Any]], first: str, second: str, tasks: Sequence[str]) -> list[Pair]:
    """Tasks and seeds that the grids plan for both methods."""
    pairs = []
    for config in configs:
        if first in config["methods"] and second in config["methods"]:
            seeds = [config["methods"][method].get("seeds", config["final"]["seeds"]) for method in (first, second)]
            pairs += [(task, seed) for task in config["tasks"] if task in tasks for seed in seeds[0] if seed in seeds[1]]
    return pairs


def table_row(row: ledger.Row) -> dict[str, Any]:
    """A row of the results: what was measured, ``None`` where a figure does not exist for the task."""
    name = row["metric"]
    kept = {key: row[key] for key in ("method", "model", "task", "seed", "lr", "forwards")}
    figures = {"loss": "loss", "loss_corrected": "loss_corrected", "metric": name, "metric_corrected": f"{name}_corrected"}
    values = {key: row.get(column) for key, column in (figures | {"constant_loss": "constant_loss"}).items()}
    values = {key: None if value is None or math.isnan(value) else value for key, value in values.items()}
    return {**kept, **values, "metric_name": name, **{key: row[key] for key in ("machine", "commit", "torch")}}


def judge(configs: list[dict[str, Any]], rows: list[ledger.Row], ours: str, trained: Sequence[str], baseline: str) -> dict[str, Any]:
    """Headroom and the verdict, as plain values."""
    found, ended = headroom(rows), verdict.curves(rows)
    tasks = list(dict.fromkeys(task for config in configs for task in config["tasks"]))
    counted = [task for task in tasks if task in found and found[task].there and task not in trained]
    others = list(dict.fromkeys(name for config in configs for name in config["methods"] if name not in (ours, "adam")))
    mine = ended.get(ours, {})
    against: dict[str, dict[str, Comparison]] = {}
    for other in others:
        pairs = planned_pairs(configs, ours, other, counted)
        against[other] = {kind: verdict.compare(mine, ended.get(other, {}), pairs, kind) for kind in KINDS}
    pairs = planned_pairs(configs, ours, baseline, counted)
    base = ended.get(baseline, {})
    gains = {kind: verdict.metric_gain(mine, base, pairs, kind) for kind in KINDS}
    shares = {kind: verdict.shares(mine, base, pairs, kind) for kind in KINDS}
    gain = {kind: statistics.fmean(gains[kind].values()) if gains[kind] else math.nan for kind in KINDS}
    known = {kind: [value for value in shares[kind].values() if not math.isnan(value)] for kind in KINDS}
    share = {kind: statistics.median(known[kind]) if known[kind] else math.nan for kind in KINDS}
    holds = bool(counted) and all(one.holds for both in against.values() for one in both.values())
    return {
        "ours": ours, "counted": counted, "trained_on": [task for task in tasks if task in trained],
        "no_headroom": [task for task in tasks if task in found and not found[task].there],
        "headroom_unknown": [task for task in tasks if task not in found],
        "headroom": {task: described(one) for task, one in found.items()}, "against": against, "baseline": baseline,
        "metric_gain": gain, "metric_gain_by_task": gains, "share_of_forwards": share, "share_by_task": shares,
        "beats_each": holds, "metric_holds": all(gain[k] >= GAIN for k in KINDS), "forwards_hold": all(share[k] <= SHARE for k in KINDS),
    }  # fmt: skip


def described(one: Headroom) -> dict[str, Any]:
    """As plain values."""
    return {"adam": one.adam, "reference": one.reference, "kind": "constant" if one.constant else "untrained", "there": one.there}


def clean(value: Any) -> Any:
    """The same as JSON has it: ``null`` where there is no number, ``never`` for infinity."""
    if isinstance(value, Comparison):
        return clean(asdict(value) | {"holds": value.holds})
    if isinstance(value, dict):
        return {key: clean(one) for key, one in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "never"
    return value


def number(value: float, form: str = "+.3f") -> str:
    """A figure, or a dash where there is none."""
    return "-" if math.isnan(value) else "never" if math.isinf(value) else format(value, form)


def report(found: dict[str, Any]) -> list[str]:
    """The verdict as Markdown."""
    ours, yes = found["ours"], {True: "yes", False: "**no**"}
    out = ["| task | Adam | reference | headroom |", "|---|---|---|---|"]
    for task, one in found["headroom"].items():
        out.append(f"| {task} | {one['adam']:.3f} | {one['reference']:.3f} ({one['kind']}) | {yes[one['there']]} |")
    sets = {"Counted": "counted", "No headroom": "no_headroom", "Trained on": "trained_on", "Headroom not measured": "headroom_unknown"}
    out += ["", " ".join(f"{title}: {', '.join(found[name]) or 'none'}." for title, name in sets.items())]
    out += ["", f"| {ours} against | figures | loss reduction | 95 % | wins | holds |", "|---|---|---|---|---|---|"]
    for other, both in found["against"].items():
        for kind, one in both.items():
            span = f"{number(one.low)} to {number(one.high)}"
            out.append(f"| {other} | {kind} | {number(one.reduction)} | {span} | {one.wins} of {one.pairs} | {yes[one.holds]} |")
    out += ["", f"| {ours} against {found['baseline']} | raw | corrected | wanted | holds |", "|---|---|---|---|---|"]
    gain, share = ([number(found[name][kind], ".2f") for kind in KINDS] for name in ("metric_gain", "share_of_forwards"))
    out.append(f"| metric, points | {gain[0]} | {gain[1]} | {GAIN} or more | {yes[found['metric_holds']]} |")
    out.append(f"| share of forwards | {share[0]} | {share[1]} | {SHARE} or less | {yes[found['forwards_hold']]} |")
    notes = {f"{other}: {name}": None for other, both in found["against"].items() for name in both["raw"].missing}
    if notes:
        out += ["", f"**Partial**: {len(notes)} planned pairs are missing:", *(f"* {note}" for note in notes)]
    diverged = {f"{other}: {name}": None for other, both in found["against"].items() for one in both.values() for name in one.diverged}
    return out + (["", "Diverged:", *(f"* {note}" for note in diverged)] if diverged else [])


def picture(found: dict[str, Any], path: Path) -> None:
    """Mean reductions with their intervals, and those by task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    names = list(found["against"])
    for axis, kind in zip(axes, KINDS, strict=True):
        for place, name in enumerate(names):
            one: Comparison = found["against"][name][kind]
            axis.plot([one.low, one.high], [place, place], color="C0", linewidth=2)
            axis.plot(one.reduction, place, "o", color="C0")
            for number_of, (task, value) in enumerate(one.by_task.items()):
                axis.plot(value, place - 0.25, ".", color=f"C{number_of + 1}", label=task if place == 0 else None)
        axis.axvline(0, color="gray", linewidth=1)
        axis.set(title=f"{found['ours']}: loss reduction, {kind}", yticks=range(len(names)), yticklabels=names)
        axis.grid(alpha=0.3)
    if axes[1].get_legend_handles_labels()[0]:
        axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(options: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", type=Path, nargs="+")
    parser.add_argument("--ledgers", type=Path, nargs="+", help="other ledgers than the grids'")
    parser.add_argument("--chosen", type=Path, help="what benchmarks.choose wrote: the tasks that the policy was made from")
    parser.add_argument("--ours", default="ours", help="the method that is judged")
    parser.add_argument("--baseline", default="uniform", help="the method for the metric and the forwards")
    parser.add_argument("--out", type=Path, default=Path("docs/results/policy.json"), help="JSON; a .md and a .png are written beside it")
    arguments = parser.parse_args(options)
    ledgers = arguments.ledgers or [None] * len(arguments.grids)
    if len(ledgers) != len(arguments.grids):
        parser.error(f"--ledgers names {len(ledgers)} files for {len(arguments.grids)} grids")
    configs = [grid.load(path, own) for path, own in zip(arguments.grids, ledgers, strict=True)]
    rows = [row for config in configs for row in Plan(config).current()]
    trained = json.loads(arguments.chosen.read_text(encoding="utf-8"))["tasks"] if arguments.chosen else []
    found = judge(configs, rows, arguments.ours, trained, arguments.baseline)
    finals = [row for row in rows if row["stage"] == "final"]
    plain = clean(found)
    content = {"rows": [table_row(row) for row in finals if row["final"]], "points": [table_row(row) for row in finals if not row["final"]],
               "headroom": plain.pop("headroom"), "verdict": plain}  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(report(found)) + "\n"
    arguments.out.with_suffix(".md").write_text("<!-- Written by benchmarks/compare.py. -->\n\n" + text, encoding="utf-8")
    picture(found, arguments.out.with_suffix(".png"))
    print(text, end="")


if __name__ == "__main__":
    main()

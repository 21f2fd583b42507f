"""From a ledger to a table and a curve.

    python -m benchmarks.report docs/results/sst2_precision.jsonl

writes ``sst2_precision.md`` and ``sst2_precision.png`` beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import ledger

Row = ledger.Row
_FIGURES = ("loss", "accuracy", "loss_corrected", "accuracy_corrected")


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    text = f"{statistics.mean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def groups(rows: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some columns, in order of appearance."""
    out: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        out[tuple(row[name] for name in names)].append(row)
    return out


def line(cells: list[str]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def search_table(rows: list[Row]) -> list[str]:
    """Loss on held-out training rows by method and learning rate."""
    runs = [row for row in rows if row["stage"] == "search" and row["final"]]
    lrs = sorted({row["lr"] for row in runs})
    out = [line(["task", "method", *(f"{lr:g}" for lr in lrs)]), line(["---"] * (len(lrs) + 2))]
    for (task, method), own in groups(runs, "task", "method").items():
        by_lr = {row["lr"]: f"{row['loss']:.3f} / {row.get('loss_corrected', row['loss']):.3f}" for row in own}
        out.append(line([task, method, *(by_lr.get(lr, "") for lr in lrs)]))
    return out


def final_table(rows: list[Row]) -> list[str]:
    """Figures at the end by task, method and learning rate; the first rows: before training, and the constant predictor."""
    finals = [row for row in rows if row["stage"] == "final"]
    names = [name for name in _FIGURES if any(name in row for row in finals)]
    out = [line(["task", "method", "lr", "seeds", *(name.replace("_", " ") for name in names)]), line(["---"] * (len(names) + 4))]
    for (task,), own in groups(finals, "task").items():
        before = [row for row in own if row["forwards"] == 0]
        firsts = {row["seed"]: row for row in before}.values()
        out.append(line([task, "before", "", str(len(firsts)), *(spread([row[name] for row in firsts]) for name in names)]))
        if "constant_loss" in before[0]:
            constant = {"loss": "constant_loss", "accuracy": "constant_accuracy"}
            cells = [spread([row[constant[name]] for row in firsts]) if name in constant else "" for name in names]
            out.append(line([task, "constant", "", str(len(firsts)), *cells]))
        for (method, lr), runs in groups([row for row in own if row["final"]], "method", "lr").items():
            out.append(line([task, method, f"{lr:g}", str(len(runs)), *(spread([row[name] for row in runs]) for name in names)]))
    return out


def curve(rows: list[Row], path: Path) -> None:
    """Bias-corrected and raw loss over forwards, one line per method and learning rate, the band from the worst to the best seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    complete = {tuple(row[name] for name in ("method", "task", "seed", "lr")) for row in rows if row["final"] and row["stage"] == "final"}
    kept = [r for r in rows if r["stage"] == "final" and (r["method"], r["task"], r["seed"], r["lr"]) in complete]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, name, title in zip(axes, ("loss", "loss_corrected"), ("raw", "bias-corrected"), strict=True):
        for (method, lr), own in groups(kept, "method", "lr").items():
            points = sorted(groups(own, "forwards").items())
            x = [forwards for (forwards,), _ in points]
            values = [[float(row[name] if name in row else row["loss"]) for row in at] for _, at in points]
            (drawn,) = axis.plot(x, [statistics.mean(v) for v in values], label=f"{method}, lr {lr:g}")
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=drawn.get_color(), alpha=0.15)
        if "constant_loss" in kept[0]:
            axis.axhline(kept[0]["constant_loss"], color="gray", linestyle=":", label="constant predictor")
        axis.set(title=f"validation loss, {title}", xlabel="forwards")
        axis.grid(alpha=0.3)
    finite = [row["loss_corrected"] if "loss_corrected" in row else row["loss"] for row in kept]
    axes[0].set(ylabel="nats", ylim=(min(finite) - 0.02, max(1.25, min(finite) + 0.2)))
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    path: Path = parser.parse_args().ledger
    rows = ledger.read(path)
    made = sorted({(row["machine"], row["commit"], row["torch"]) for row in rows})
    text = [
        "<!-- Written by benchmarks/report.py. -->",
        "",
        "Before and after, on all validation rows (mean ± standard deviation over seeds):",
        "",
    ]
    text += [*final_table(rows), "", f"![curves]({path.stem}.png)", "", "Search, loss on held-out training rows, raw / bias-corrected:", ""]
    text += [*search_table(rows), "", "Made by: " + "; ".join(f"{m}, commit {c}, torch {t}" for m, c, t in made) + "."]
    path.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    curve(rows, path.with_suffix(".png"))
    print("\n".join(text))


if __name__ == "__main__":
    main()

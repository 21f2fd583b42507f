"""Loss and metric of a run over its forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_METRICS = ("accuracy", "f1", "exact_match")


def plot_run(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw what ``metrics.csv`` holds.

    Args:
        rows: The file's rows; empty cells are left out.
        path: Where the picture goes.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = {name: _curve(rows, name) for name in dict.fromkeys(key for row in rows for key in row)}
    metric = next((name for name in _METRICS if curves.get(f"val/{name}")), None)
    if not any(curves.get(name) for name in ("train/loss", "val/loss")):
        return False
    figure, axes = plt.subplots(1, 2 if metric else 1, figsize=(10 if metric else 6, 3.6), layout="constrained", squeeze=False)
    shown = {"train/loss": "training batch", "val/loss": "validation", "val/loss_corrected": "validation, bias-corrected"}
    for name, label in shown.items():
        if curves.get(name):
            axes[0, 0].plot(*zip(*curves[name], strict=True), label=label, alpha=0.3 if name == "train/loss" else 1.0)
    _constant(axes[0, 0], curves, "val/constant_loss")
    axes[0, 0].set(xlabel="forwards", ylabel="loss (nats)")
    if metric:
        for name, label in ((f"val/{metric}", "validation"), (f"val/{metric}_corrected", "validation, bias-corrected")):
            if curves.get(name):
                axes[0, 1].plot(*zip(*curves[name], strict=True), marker=".", label=label)
        _constant(axes[0, 1], curves, f"val/constant_{metric}")
        axes[0, 1].set(xlabel="forwards", ylabel=metric.replace("_", " "))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(forwards, value); a row without forwards stands at the last ones seen."""
    forwards, points = 0.0, []
    for row in rows:
        forwards = float(row.get("train/forwards", forwards))
        if name in row:
            points.append((forwards, float(row[name])))
    return points


def _constant(axis: Any, curves: Mapping[str, Sequence[tuple[float, float]]], name: str) -> None:
    if curves.get(name):
        axis.axhline(curves[name][-1][1], color="gray", linestyle=":", label="constant predictor")

"""How long a step takes: ours, the field's usual loop, and the limit, in one run on one GPU.

    python -m benchmarks.step_time --shapes smollm2-135m llama-3.2-1b --out docs/results

The limit is two plain forwards of the batch with the full-vocabulary loss at one position a row, as one CUDA graph, with compiled
layers for shapes that are bound by launches. Medians over 15 to 50 steps, batch of 16 rows. Ours is ``ZOOptimizer`` with its defaults on a
candidate objective (two candidates a row); with the low-rank sampler updates are deferred, and ``ours_mean_ms`` has the windows' ends;
with ``--deferred`` those of the others are too.
``textbook_ms`` is MeZO's loop operation by operation (``benchmarks.textbook.Released``), ``lean_textbook_ms`` the same in-place
arithmetic in as few launches as eager PyTorch allows, on our objective (``Textbook``). ``peak_over_weights`` leaves out what earlier
measurements of the process left behind (``left_behind_mib``). A row is added to the output as it is measured, or takes the place of an
older one of the same settings.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import ledger, shapes
from benchmarks.textbook import Released, Textbook
from zolightning import DenseSpace, GaussianSampler, LowRankSampler, PolicySampler, RademacherSampler, ZOOptimizer
from zolightning.objectives import CandidateCrossEntropy
from zolightning.objectives.base import BoundObjective
from zolightning.objectives.forward import last_logits, wide
from zolightning.optim.probing import compiled_layers
from zolightning.policies import PertNN
from zolightning.samplers import Sampler

ROWS = 16
KEY = ("shape", "tokens", "dtype", "sampler", "deferred", "machine")
SAMPLERS = {"gaussian": GaussianSampler, "rademacher": RademacherSampler, "low-rank": LowRankSampler}


class Scaled(GaussianSampler):
    """Gaussian with a scale of its own for every block, as a policy gives it."""

    def scales(self) -> Tensor:
        if not hasattr(self, "_scales"):
            self._scales = torch.linspace(0.5, 1.5, len(self.blocks), device=self.blocks[0].tensor.device)
        return self._scales


def milliseconds(run: Callable[[], Any], repeats: int, warm_up: int = 3) -> float:
    """Median time between the ends of two calls, on the GPU's clock; on a CPU the host's."""
    for _ in range(warm_up):
        run()
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def limit(model: nn.Module, batch: dict[str, Tensor], compiled: bool) -> float:
    """Two plain forwards, captured."""
    target = batch["candidates"][:, 0]

    def forward() -> Tensor:
        return F.cross_entropy(wide(last_logits(model, batch, 1)[:, -1]), target)

    def two() -> tuple[Tensor, Tensor]:
        return forward(), forward()

    space = DenseSpace(model)
    if not torch.cuda.is_available():
        return milliseconds(two, 3)
    with compiled_layers(space) if compiled else nullcontext():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        hidden = {**batch, "attention_mask": batch["attention_mask"].clone()}
        hidden["attention_mask"][0, 0] = 0
        with torch.cuda.stream(stream):
            for _ in range(2):
                wide(last_logits(model, hidden, 1))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            two()
        return milliseconds(graph.replay, 30)


def ours(model: nn.Module, bound: BoundObjective, sampler: Sampler, repeats: int, deferred: bool) -> tuple[float, ZOOptimizer, float]:
    """Milliseconds a step, the optimizer, and seconds of the first step."""
    optimizer = ZOOptimizer(DenseSpace(model), sampler, lr=1e-7, eps=1e-3)
    optimizer.deferred = deferred or isinstance(sampler, LowRankSampler)
    start = time.perf_counter()
    float(optimizer.step(bound))
    first = time.perf_counter() - start
    return milliseconds(lambda: optimizer.step(bound), repeats), optimizer, first


def mean_milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Mean time of a call, by the host's clock."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - start) * 1e3 / repeats


@torch.no_grad()
def parts(optimizer: ZOOptimizer, repeats: int) -> dict[str, float]:
    """Milliseconds of the passes over the weights alone: all layers perturbed, and the update."""
    space, group = optimizer.space, optimizer.param_groups[0]
    assert isinstance(space, DenseSpace)
    directions = optimizer.sampler.directions(group["seed"], group["step"], 1, optimizer._clock)
    from zolightning.spaces.hosts import Matrix

    no, valid = torch.zeros(1, device=space.device), torch.ones((), dtype=torch.bool, device=space.device)

    def materialise() -> None:
        view = space._view(directions[0], 1e-3, 2)
        for host in space._hosts:
            host.materialise(view, whole=False)
            for owner in host.owners:
                source = space._source(owner.index, view) if owner.index in host.lazy and isinstance(owner.module, nn.Linear) else None
                if isinstance(source, Matrix):
                    for _ in source._made():
                        pass

    def replayed(run: Callable[[], Any]) -> float:
        if not torch.cuda.is_available():
            return milliseconds(run, 3)
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return milliseconds(graph.replay, repeats)

    return {"perturb": replayed(materialise), "update": replayed(lambda: space.move(directions, no, 0.0, valid))}


def profile(optimizer: ZOOptimizer, bound: BoundObjective, top: int = 14) -> list[tuple[str, float, float]]:
    """Kernels of a step that take longest: name, launches and milliseconds a step."""
    if not torch.cuda.is_available():
        return []
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    steps = 3
    with record(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            optimizer.step(bound)
        torch.cuda.synchronize()
    kernels = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)[:top]
    return [(event.key[:90], event.count / steps, round(event.self_device_time_total / steps / 1e3, 4)) for event in kernels]


def no_synchronisation(optimizer: ZOOptimizer, bound: BoundObjective, steps: int) -> bool:
    """Some steps with every wait for the device an error."""
    if not torch.cuda.is_available():
        return True
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            optimizer.step(bound)
    except RuntimeError:
        logging.exception("waits for the device")
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def measure(
    shape: str, tokens: int, dtype: torch.dtype, samplers: list[str], device: torch.device, deferred: bool = False
) -> Iterator[ledger.Row]:
    """The rows of one shape, one by one."""
    model = shapes.make(shape, dtype, device)
    made = shapes.batch(model, ROWS, tokens, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cuda = device.type == "cuda"
    with torch.no_grad():
        limit_ms = limit(model, made, shape in shapes.LAUNCH_BOUND and cuda)
        repeats = min(max(round(3000 / limit_ms), 15), 50) if cuda else 3
        bound, lean, loop = CandidateCrossEntropy().on(model, made), Textbook(model, lr=1e-7), Released(model, lr=1e-7)
        lean_ms = milliseconds(lambda: lean.step(bound), 5 if cuda else 1, warm_up=1)
        sequences = torch.cat([made["input_ids"].repeat_interleave(2, 0)[:, 1:], made["candidates"].reshape(-1, 1)], dim=1)
        textbook_ms = milliseconds(lambda: loop.step(sequences, made["label"]), 5 if cuda else 1, warm_up=1)
    torch._dynamo.reset()  # ours compiles for its own shape, as if it were alone
    for name in samplers:
        gc.collect()
        left = 0
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            left = torch.cuda.memory_allocated() - weights
        ours_ms, optimizer, first = ours(model, bound, SAMPLERS[name](), repeats, deferred)
        peak = torch.cuda.max_memory_allocated() - left if cuda else weights
        row: ledger.Row = {"shape": shape, "tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "sampler": name}
        row |= {
            "limit_ms": limit_ms,
            "textbook_ms": textbook_ms,
            "lean_textbook_ms": lean_ms,
            "ours_ms": ours_ms,
            "ours_mean_ms": mean_milliseconds(partial(optimizer.step, bound), getattr(optimizer.sampler, "window", repeats)),
            "peak_over_weights": peak / weights,
            "left_behind_mib": left / 2**20,
        }
        row |= {"rows": ROWS, "first_step_s": first, "form": optimizer.param_groups[0]["form"], "deferred": optimizer.deferred}
        row |= parts(optimizer, repeats)
        row["no_synchronisation"] = no_synchronisation(optimizer, bound, repeats)
        row["profile"] = profile(optimizer, bound)
        if name == "gaussian" and shape in shapes.LAUNCH_BOUND:
            for label, other in (("table", Scaled()), ("pert_nn", PolicySampler(PertNN())), ("again", GaussianSampler())):
                row[f"ours_{label}_ms"], optimizer, _ = ours(model, bound, other, repeats, deferred)
        del optimizer
        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        print(table([row])[-1], flush=True)
        yield row


def table(rows: list[ledger.Row]) -> list[str]:
    """Lines to print."""
    head = f"{'shape':14s} {'T':>4s} {'dtype':9s} {'sampler':10s} {'limit':>8s} {'ours':>8s} {'ours/lim':>8s} "
    head += f"{'textbook':>8s} {'text/ours':>9s} {'peak/w':>6s}"
    lines = [head]
    for row in rows:
        ratio, gain = row["ours_ms"] / row["limit_ms"], row["textbook_ms"] / row["ours_ms"]
        lines.append(
            f"{row['shape']:14s} {row['tokens']:4d} {row['dtype']:9s} {row['sampler']:10s} {row['limit_ms']:8.2f} {row['ours_ms']:8.2f} "
            f"{ratio:8.2f} {row['textbook_ms']:8.1f} {gain:9.1f} {row['peak_over_weights']:6.2f}"
        )
    return lines


def chart(rows: list[ledger.Row], path: Path) -> None:
    """Where the time of a step goes, beside the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.4), layout="constrained")
    labels = [
        f"{row['shape']}, T={row['tokens']}, {row['dtype']}, {row['sampler']}" + ", deferred" * row.get("deferred", False) for row in rows
    ]
    left = [0.0] * len(rows)
    for name in ("perturb", "update", "rest"):
        widths = [(row[name] if name in row else row["ours_ms"] - row["perturb"] - row["update"]) / row["limit_ms"] for row in rows]
        axes.barh(labels, widths, left=left, label={"perturb": "perturb layers", "rest": "forwards and rest"}.get(name, name))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(1, color="gray", linestyle=":", label="limit: two captured plain forwards")
    axes.set(xlabel="time of a step / limit")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    figure.legend(fontsize=8, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "llama-3.2-1b"], choices=list(shapes.SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--samplers", nargs="+", default=["gaussian", "rademacher"], choices=list(SAMPLERS))
    parser.add_argument("--deferred", action="store_true", help="let updates wait for the next step's probes")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of step_time.json and step_time.png")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {**ledger.made_by(), "command": ledger.command("step_time")}
    rows: list[ledger.Row] = []
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            for tokens in arguments.tokens:
                for row in measure(shape, tokens, getattr(torch, dtype), arguments.samplers, device, arguments.deferred):
                    rows.append(row)
                    chart(ledger.replace(arguments.out / "step_time.json", row | about, KEY), arguments.out / "step_time.png")
                gc.collect()
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()

"""Time and memory of a step on quantised models, against two plain forwards of the same model, on one GPU.

    python -m benchmarks.quantised --shapes llama-3.1-8b --quantizations nf4 int8 --spaces adapter scales bank --out docs/results

Random weights of a shape, quantised layer by layer, so that the 16-bit model is never whole on the card. ``limit_ms``: two plain
forwards with the full-vocabulary loss at one position a row, as one CUDA graph; the faster one of plain and compiled layers.
``ours_ms``: a step of ``ZOOptimizer`` with its defaults, on a candidate objective. ``peak_gib``: most memory that was allocated in
training steps, without what earlier measurements of the process left behind (``left_behind_mib``); a step is captured anew for it,
since a replay asks for none. ``setup_peak_gib``: the same from the making of the space to
the end of the first step. Rows are added to the output, or replace those of the same settings, as they come: a command that is cut
short loses one.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zolightning
from benchmarks import ledger, shapes
from benchmarks.step_time import ROWS, limit, milliseconds
from zolightning import ZOOptimizer
from zolightning.models import Packing, Quantization, settle, weight_bytes
from zolightning.objectives import CandidateCrossEntropy
from zolightning.optim.graphs import StepGraphs
from zolightning.spaces.hosts import layer_paths

SPACES = {"adapter": "AdapterSpace", "scales": "QuantScaleSpace", "bank": "LowRankSpace"}
KEY = ("shape", "quantization", "space", "tokens", "machine")


def make(shape: str, kind: Quantization, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of that shape with random weights whose layers are quantised, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(shapes.SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **{**settings, "num_hidden_layers": 2})
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers: Any = model.get_submodule(layer_paths(model)[0].rpartition(".")[0])
    for index in range(settings["num_hidden_layers"]):
        if index >= len(layers):
            with torch.device(device):
                layers.append(type(layers[0])(config, index).to(dtype))
        pack(layers[index], kind, dtype)
    model.config.num_hidden_layers = len(layers)
    model.config.quantization_config = Packing(kind).config(dtype)
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)  # peft asks
    settle(model, dtype)
    return model.eval()


def pack(layer: nn.Module, kind: Quantization, dtype: torch.dtype) -> None:
    """Quantise the linear maps of a layer, as bitsandbytes does while a model is loaded."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for path, module in [(path, module) for path, module in layer.named_modules() if isinstance(module, nn.Linear)]:
        has_bias, sizes, weight = module.bias is not None, (module.in_features, module.out_features), module.weight.data
        packed: Any
        with torch.device("meta"):
            if kind == "int8":
                packed = Linear8bitLt(*sizes, has_bias, has_fp16_weights=False)
            else:
                packed = Linear4bit(*sizes, has_bias, dtype, compress_statistics=False, quant_type=kind)
        if kind == "int8":
            packed.weight = Int8Params(weight, requires_grad=False)._quantize(weight.device)
        else:
            parameter = Params4bit(weight, compress_statistics=False, quant_type=kind, module=packed)
            packed.weight = parameter._quantize(weight.device)
        packed.bias = module.bias
        layer.set_submodule(path, packed)


def fastest_forwards(shape: str, kind: Quantization, tokens: int, device: torch.device, seed: int) -> dict[str, Any]:
    """Size of a model, and milliseconds of two plain forwards."""
    model = make(shape, kind, device, seed)
    batch = shapes.batch(model, ROWS, tokens, device)
    with torch.no_grad():
        plain = limit(model, batch, compiled=False)
        compiled = limit(model, batch, compiled=True) if device.type == "cuda" else plain
    torch._dynamo.reset()
    return {"weights_gib": weight_bytes(model) / 2**30, "limit_ms": min(plain, compiled), "plain_ms": plain, "compiled_ms": compiled}


def measure(shape: str, kind: Quantization, space: str, tokens: int, device: torch.device, seed: int, repeats: int) -> dict[str, Any]:
    """Time and memory of our step."""
    gc.collect()
    left = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    model = make(shape, kind, device, seed)
    batch = shapes.batch(model, ROWS, tokens, device)
    peak(device)
    moving = getattr(zolightning, SPACES[space])(model)
    bound = CandidateCrossEntropy().on(moving.model, batch)
    optimizer = ZOOptimizer(moving, lr=1e-7, eps=1e-3, seed=seed)
    start = time.perf_counter()
    before = float(optimizer.step(bound))
    row: dict[str, Any] = {"first_step_s": time.perf_counter() - start, "setup_peak_gib": peak(device)}
    optimizer._graphs = StepGraphs(optimizer._compute)
    row["ours_ms"] = milliseconds(lambda: optimizer.step(bound), repeats)
    row["peak_gib"] = peak(device)
    row |= {"moves": moving.numel, "form": optimizer.param_groups[0]["form"], "loss": before, "skipped": optimizer.skipped}
    row |= {name: row[name] - left for name in ("setup_peak_gib", "peak_gib") if row[name] is not None}
    row["left_behind_mib"] = left * 1024
    torch._dynamo.reset()
    return row


def peak(device: torch.device) -> float | None:
    """Most GiB that were allocated since the last call; ``None`` on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most / 2**30


def table(rows: list[ledger.Row]) -> list[str]:
    """Lines to print."""
    head = f"{'shape':14s} {'quant':5s} {'space':8s} {'weights':>8s} {'peak':>6s} {'set-up':>6s} {'peak/w':>6s} {'limit':>8s} {'ours':>8s}"
    lines = [head + f" {'ours/lim':>8s}  form"]
    for row in rows:
        peaks = [row["peak_gib"], row["setup_peak_gib"], row["peak_gib"] / row["weights_gib"] if row["peak_gib"] else None]
        shown = " ".join(f"{value:6.2f}" if value is not None else f"{'-':>6s}" for value in peaks)
        form = ", ".join(name for name in ("paired", "captured", "compiled") if (row["form"] or {}).get(name)) or "one by one"
        lines.append(
            f"{row['shape']:14s} {row['quantization']:5s} {row['space']:8s} {row['weights_gib']:8.2f} {shown} {row['limit_ms']:8.2f} "
            f"{row['ours_ms']:8.2f} {row['ratio']:8.2f}  {form}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "llama-3.1-8b", "opt-13b"], choices=list(shapes.SHAPES))
    parser.add_argument("--quantizations", nargs="+", default=["nf4", "int8"], choices=["nf4", "fp4", "int8"])
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--tokens", type=int, default=64, help="length of a row")
    parser.add_argument("--seed", type=int, default=0, help="of weights and directions")
    parser.add_argument("--repeats", type=int, default=None, help="steps that are timed; 30 on a GPU, 3 on a CPU")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of quantised.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    repeats = arguments.repeats or (30 if device.type == "cuda" else 3)
    import bitsandbytes

    about = ledger.made_by() | {"bitsandbytes": bitsandbytes.__version__}
    about |= {"command": ledger.command("quantised"), "seed": arguments.seed}
    rows: list[ledger.Row] = []
    for shape in arguments.shapes:
        for kind in arguments.quantizations:
            same = fastest_forwards(shape, kind, arguments.tokens, device, arguments.seed)
            for space in arguments.spaces:
                row: ledger.Row = {"shape": shape, "quantization": kind, "space": space, "tokens": arguments.tokens, "batch": ROWS, **same}
                row |= measure(shape, kind, space, arguments.tokens, device, arguments.seed, repeats)
                row |= {"ratio": row["ours_ms"] / row["limit_ms"], **about}
                row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
                print(table([row])[-1], flush=True)
                ledger.replace(arguments.out / "quantised.json", row, KEY)
                rows.append(row)
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()

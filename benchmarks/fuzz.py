"""Damaged and hostile files: no crash, no traceback, no hang, no wrong answer.

    python -m benchmarks.fuzz --journals 10000 --policies 10000 --yamls 1000 --out docs/results/fuzz.json

Journals and policies are changed at random: bits, bytes, pieces cut out, repeated, exchanged or inserted, ends cut off. A file that is
accepted must say what the unchanged one says, up to where it was cut. Besides, journals whose checksums were made right again: those may
say anything, but must be read or refused. Configurations are changed and parsed by the command.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import ledger

_SECONDS = 20  # what takes longer hangs


def mutate(data: bytes, dice: random.Random) -> bytes:
    """Change a file at random, at one to three places."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        at, size = dice.randrange(len(out) + 1), dice.choice((1, 4, 20, 200))
        kind = dice.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << dice.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = dice.choice((0, 255, dice.randrange(256)))
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at:at] = dice.randbytes(size)
        elif kind == 5:
            other = dice.randrange(len(out) + 1)
            out[at : at + size] = out[other : other + size]
        else:
            del out[at:]
    return bytes(out)


def sign(data: bytes) -> bytes:
    """Make the checksums of a journal right again, as far as its frames can be told apart."""
    from zolightning.journal.file import MAGIC, START, pack

    out, at, checksum = MAGIC, len(MAGIC), START.checksum
    while at + 9 <= len(data):
        kind, length, _ = struct.unpack_from("<BII", data, at)
        payload = data[at + 9 : at + 9 + length]
        frame, checksum = pack(bytes([kind]), payload, checksum)
        out += frame
        at += 9 + length + 4
    return out


def mutate_signed(data: bytes, dice: random.Random) -> bytes:
    """Change the content of a journal, with right checksums."""
    return sign(mutate(data, dice)) if dice.random() < 0.5 else sign(data[:8] + mutate(data[8:], dice))


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Interrupt what hangs."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attack(
    count: int, data: bytes, path: Path, seed: int, change: Callable[[bytes, random.Random], bytes], use: Callable[[], bool]
) -> dict[str, Any]:
    """Change a file many times and use it.

    Args:
        count: How many times.
        data: The file.
        path: Where the changed one is put.
        seed: Of the changes.
        change: Makes one.
        use: Uses the file: false if it says something wrong; a ``ValueError`` of one line refuses it.

    Returns:
        How many were refused, accepted, wrong, crashed; and the first crash.
    """
    dice, seen, example = random.Random(seed), Counter[str](), ""
    slowest = 0.0
    for _ in range(count):
        changed = change(data, dice)
        if changed == data:
            seen["unchanged"] += 1
            continue
        path.write_bytes(changed)
        start = time.perf_counter()
        try:
            with limited():
                seen["accepted" if use() else "wrong"] += 1
        except ValueError as error:
            clear = 10 < len(str(error)) < 400 + len(str(path)) and "\n" not in str(error)
            seen["refused" if clear else "crashed"] += 1
            example = example or ("" if clear else repr(error))
        except Exception as error:
            seen["crashed"] += 1
            example = example or repr(error)
        slowest = max(slowest, time.perf_counter() - start)
    names = ("refused", "accepted", "wrong", "crashed", "unchanged")
    return {name: seen[name] for name in names} | {"slowest_seconds": round(slowest, 2), "first_crash": example}


def small() -> nn.Linear:
    """Two blocks."""
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.copy_(torch.arange(12.0).view(3, 4) / 10)
        model.bias.fill_(1.0)
    return model


def journals(count: int, folder: Path, seed: int, signed: bool = False) -> dict[str, Any]:
    """Attack :func:`zolightning.replay`.

    Args:
        count: How many changed journals.
        folder: For files.
        seed: Of the changes.
        signed: With right checksums; then only crashes are looked for.
    """
    import zolightning as zl
    from zolightning.journal import Back, Recorder

    path, model = folder / "journal.zo", small()
    optimizer = zl.ZOOptimizer(zl.DenseSpace(model.eval()), lr=0.01, eps=0.01)
    recorder = Recorder(path, optimizer, "small")
    right = {0: bits(model)}
    for step in range(1, 13):
        optimizer.step(lambda: model(torch.ones(1, 4)).square().sum())
        right[step] = bits(model)
        if step % 3 == 0:
            recorder.drain()
    if signed:
        recorder.go_back(Back(12, 6, 0.5))
    recorder.close()
    data = path.read_bytes()

    def use() -> bool:
        fresh = small()
        return right.get(zl.replay(path, fresh)) == bits(fresh) or signed

    return attack(count, data, path, seed, mutate_signed if signed else mutate, use)


def bits(model: nn.Module) -> bytes:
    """All weights."""
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


def policies(count: int, folder: Path, seed: int) -> dict[str, Any]:
    """Attack :func:`zolightning.policies.load_policy`."""
    from zolightning.policies import BlockInfo, FeaturePolicy, load_policy

    blocks = [BlockInfo(f"layers.{i}.mlp.up_proj.weight", (4, 3)) for i in range(3)]
    path = FeaturePolicy(hidden=4).bind(blocks).save_pretrained(folder / "policy.safetensors")
    data = path.read_bytes()
    right = {name: tensor.clone() for name, tensor in load_policy(str(path)).state_dict().items()}

    def use() -> bool:
        found = load_policy(str(path))
        state = found.state_dict()
        return found.blocks == tuple(blocks) and state.keys() == right.keys() and all(torch.equal(state[n], right[n]) for n in right)

    return attack(count, data, path, seed, mutate, use)


def yamls(count: int, folder: Path, seed: int) -> dict[str, Any]:
    """Attack the command's reading of configurations (``fit --print_config``: nothing is trained)."""
    from zolightning.cli import main

    data, path = Path("configs/quickstart.yaml").read_bytes(), folder / "run.yaml"
    sys.argv = ["zolightning"]

    def use() -> bool:
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main(["fit", f"--config={path}", "--print_config"])
        except SystemExit as stop:
            if stop.code:
                message = err.getvalue().strip()
                if not message.startswith("error: ") or "Traceback" in message:
                    raise RuntimeError(message[-500:]) from stop
                raise ValueError(message.splitlines()[0][:300]) from stop
        return bool(out.getvalue())

    return attack(count, data, path, seed, mutate, use)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--journals", type=int, default=10_000)
    parser.add_argument("--policies", type=int, default=10_000)
    parser.add_argument("--yamls", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, seed = Path(name), arguments.seed
        result: dict[str, Any] = {
            "journals": journals(arguments.journals, folder, seed),
            "journals_with_right_checksums": journals(arguments.journals, folder, seed + 1, signed=True),
            "policies": policies(arguments.policies, folder, seed),
            "yamls": yamls(arguments.yamls, folder, seed),
        }
    ok = all(part["crashed"] == part["wrong"] == 0 for part in result.values())
    result |= ledger.made_by() | {"seed": arguments.seed}
    if arguments.out:
        ledger.write(arguments.out, result)
    print(json.dumps(result, indent=1))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()

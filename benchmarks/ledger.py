"""A results file that is readable while partial: one JSON object a line, appended under a lock."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def append(path: Path, *rows: Row) -> None:
    """Add lines, one after another; safe with several writers, flushed to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """All whole lines; a torn last line is left out."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def write(path: Path, result: Row) -> None:
    """A result as a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")  # one that is cut short leaves the old file
    new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def replace(path: Path, row: Row, key: Sequence[str]) -> list[Row]:
    """Put a row into a results file, in place of an older one that is alike in ``key``; returns all its rows."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [other for other in rows if any(other.get(name) != row[name] for name in key)]
    write(path, {"rows": [*rows, row]})
    return [*rows, row]


def made_by() -> Row:
    """What made a result: machine, commit and version of PyTorch."""
    return {"machine": machine(), "commit": commit(), "torch": torch.__version__}


def command(module: str) -> str:
    """The command line of a benchmark.

    Args:
        module: Its name.
    """
    return " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]])


def machine() -> str:
    """The accelerator, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def commit() -> str:
    """Commit of the code, with ``+`` if files differ; ``ZOLIGHTNING_COMMIT`` where there is no git."""
    if name := os.environ.get("ZOLIGHTNING_COMMIT"):
        return name
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")

"""A function in several processes at once, which know one another through gloo."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, connect: bool = True, timeout: float = 30.0, wait: float = 120.0
) -> list[Any]:
    """Call a function in forked processes.

    Args:
        world: How many.
        function: What each calls.
        arguments: With these.
        connect: Form the group; otherwise a Trainer does so, from the environment.
        timeout: Seconds that the group waits for a process.
        wait: Seconds after which processes that still run are killed.

    Returns:
        What each returned; an exception that it raised; or the exit status of one that did neither.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        work = [(rank, world, folder, port, connect, timeout, function, arguments) for rank in range(world)]
        processes = [context.Process(target=_run, args=each) for each in work]
        for process in processes:
            process.start()
        for process in processes:
            process.join(wait)
            process.kill()
            process.join()
        files = [Path(folder) / str(rank) for rank in range(world)]
        return [torch.load(f, weights_only=False) if f.exists() else p.exitcode for f, p in zip(files, processes, strict=True)]


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _run(
    rank: int, world: int, folder: str, port: int, connect: bool, timeout: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    faulthandler.dump_traceback_later(90, exit=True)  # says where it hangs
    torch.set_num_threads(1)
    if connect:
        dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=timeout), world, rank)
    result: Any
    try:
        result = function(*arguments)
    except Exception as error:
        result = type(error)(str(error))
    torch.save(result, f"{folder}/{rank}.partial")
    os.replace(f"{folder}/{rank}.partial", f"{folder}/{rank}")
    sys.stdout.flush()
    os._exit(0)  # nothing of the test process is to be cleaned up here

"""Replicas through Lightning: a process per device, no wrapper, no gradient buckets, and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor

from zolightning.optim import ReplicaLostError, Replicas, ZOOptimizer
from zolightning.optim.replicas import Mode, contact

_PARENT = "ZOLIGHTNING_REPLICA_0"  # tells a process that another one has started it, and which
_LOOK = 1.0  # seconds between two looks at the others
_GRACE = 5.0  # seconds in which a process may leave, or tell its reason, by itself


class ReplicaStrategy(DDPStrategy):
    """Several devices that hold the same weights and share the forwards of every step.

    Batch size and queries are those of the whole run, whatever the number of devices, and so is the result: in mode ``directions`` to
    the bit, in mode ``rows`` to the rounding of the losses of rows. Losses are all that devices tell each other. Evaluation is done by
    each device on all rows; files and figures are written by the first.

    Args:
        mode: What devices divide. ``rows``: each runs all directions on its rows of the batch; ``directions``: each runs some of the
            queries on the whole batch.
        check_every: Steps between two comparisons of the weights of all devices, bit by bit. The first step is always compared.
        timeout: Seconds to wait for a device that does not answer.
        process_group_backend: ``nccl`` or ``gloo``; without it: nccl on GPUs, gloo on CPUs.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> trainer = lightning.Trainer(devices=2, strategy=ReplicaStrategy(mode="rows"))  # doctest: +SKIP
    """

    def __init__(
        self, mode: Mode = "rows", check_every: int = 200, timeout: float = 600.0, process_group_backend: str | None = None
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} must be positive")
        super().__init__(timeout=timedelta(seconds=timeout), process_group_backend=process_group_backend)
        #: What the optimizer is given.
        self.replicas = Replicas(mode, check_every)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Connect the processes."""
        with contact():
            super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Every process sees the whole batch; the optimizer takes its part."""
        trainer._accelerator_connector.use_distributed_sampler = False
        _leave_alone_on_sigterm(trainer)
        super().setup(trainer)

    @torch.no_grad()
    def configure_ddp(self) -> None:
        """In place of the wrapper: all start with the weights of the first."""
        assert self.model is not None
        with contact():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                dist.broadcast(tensor.data, 0)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Tell the optimizer that it is not alone."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if isinstance(optimizer, ZOOptimizer) and self.world_size > 1:
                optimizer.replicas = self.replicas

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all."""
        with contact():
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give an object to all."""
        with contact():
            return super().broadcast(obj, src)

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Combine a tensor of all."""
        with contact():
            return super().reduce(tensor, group, reduce_op)

    def teardown(self) -> None:
        """Let go of captured steps, which hold the connection."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, ZOOptimizer):
                optimizer.release()
        super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        """One process speaks, and all leave."""
        super().on_exception(exception)
        cast(_Launcher, self._launcher).leave(exception)


def _leave_alone_on_sigterm(trainer: Trainer) -> None:
    """SIGTERM ends a process after its step, without asking the others.

    Lightning asks all of them before every batch, and so waits for the device; and its signal handler speaks to processes that may be
    in the middle of something else.
    """

    def note(*arguments: Any) -> None:
        if not connector.received_sigterm and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)
        connector.received_sigterm = True

    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = note
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None


class _Launcher(_SubprocessScriptLauncher):
    """Starts the script once more for each further device of this host; then the processes watch one another.

    Lightning's own watch kills the process that it runs in without a word.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run a function in all processes."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[_PARENT] = str(os.getpid())
            try:
                self._call_children_scripts()
            finally:
                del os.environ[_PARENT]
        _set_num_threads_if_needed(self.num_processes)
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done,), daemon=True, name="replicas").start()
        try:
            result = function(*args, **kwargs)
            if dist.is_initialized():
                with contact():
                    dist.barrier()  # none is thought dead because it was the first to end
            return result
        finally:
            done.set()

    def _watch(self, done: threading.Event) -> None:
        """Leave if another process of this host is dead, also where the main thread waits for the device forever."""
        while not done.wait(_LOOK):
            gone = self.gone()
            if gone and not done.wait(_GRACE):
                sys.stderr.write(f"error: {gone}\n")
                sys.stderr.flush()
                self.kill(signal.SIGKILL)
                os._exit(2)

    def gone(self) -> str:
        """Which process of this host is dead, in one line; empty where all are well."""
        parent = os.environ.get(_PARENT)
        if parent is not None:
            return _obituary(0, None) if os.getppid() != int(parent) else ""
        first = self.cluster_environment.global_rank()
        dead = [(first + number, process.poll()) for number, process in enumerate(self.procs, 1) if process.poll() is not None]
        return _obituary(*dead[0]) if dead else ""

    def leave(self, exception: BaseException) -> None:
        """Say who is dead, if that is why; end the processes that this one has started, or wait to be ended by the one that did.

        What is wrong with a run is wrong on all, and the first process says it. Another one says it only if the first does not.
        """
        started = _PARENT in os.environ
        if started or (self.procs and isinstance(exception, ReplicaLostError)):
            end = time.monotonic() + (2 * _GRACE if started else _GRACE)
            while not self.gone() and time.monotonic() < end:
                time.sleep(0.1)
        if isinstance(exception, ReplicaLostError):
            exception.args = (self.gone() or str(exception),)
        self.kill(signal.SIGKILL)


def _obituary(rank: int, status: int | None) -> str:
    """What became of a process; a negative status is a signal."""
    how = "is gone" if status is None else f"was killed ({signal.Signals(-status).name})" if status < 0 else f"stopped with status {status}"
    return f"replica {rank} {how}; the run goes on from its last checkpoint, with any number of replicas"

"""What a journal says about its run, once: base weights, blocks, seed, noise and rule."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from zolightning.blocks import Block
from zolightning.noise import Key, LowRankNoise
from zolightning.optim.optimizer import ZOOptimizer
from zolightning.optim.rules import SGD, Rule
from zolightning.samplers import GaussianSampler, LowRankSampler, RademacherSampler, Sampler

FORMAT = 1
_SAMPLERS: dict[str, type[Sampler]] = {"gaussian": GaussianSampler, "rademacher": RademacherSampler}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_SAMPLES = 1024  # elements of a block whose places count in its fingerprint
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "str": (str,), "float": (int, float), "tuple[str, ...]": (list,), "dict[str, Any] | None": (dict, type(None)),
    "tuple[tuple[str, str, tuple[int, ...]], ...]": (list,),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that turns the records of steps into a change of weights.

    Args:
        base: Hub id or folder of the base model; empty where nobody said.
        fingerprint: Of the blocks' weights at step ``start``, see :func:`fingerprint`.
        start: Step at which the journal begins: 0, or that of a checkpoint.
        blocks: Name, type and shape of each.
        seed: Of all directions.
        sampler: Class of the sampler.
        noise: Distribution of the noise: gaussian, rademacher, low_rank:RANK:WINDOW, or empty for a class of the user's own.
        estimator: Class of the estimator.
        queries: Coefficients of a step.
        probes: Losses of a step.
        eps: Probe distance.
        rule: Class of the update rule.
        weight_decay: Its rate.
        precision: Type of coefficients, losses and learning rates: float32 or float64.
        form: How losses were evaluated; see :class:`zolightning.optim.probing.Form`.
        deferred: 1 where moves of low rank waited beside the weights, else 0.
    """

    base: str
    fingerprint: str
    start: int
    blocks: tuple[tuple[str, str, tuple[int, ...]], ...]
    seed: int
    sampler: str
    noise: str
    estimator: str
    queries: int
    probes: int
    eps: float
    rule: str
    weight_decay: float
    precision: str
    form: dict[str, Any] | None
    deferred: int

    def to_bytes(self) -> bytes:
        """As JSON; floats keep their bits."""
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Settings:
        """From JSON.

        Raises:
            ValueError: Something is missing, of another type or out of range.
        """
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError("its settings are not JSON") from error
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not the one that this version reads ({FORMAT})")
        known = {field.name: _KINDS[str(field.type)] for field in fields(cls)}
        if found.keys() != known.keys():
            raise ValueError(f"its settings are {', '.join(sorted(found))[:200]}, expected {', '.join(sorted(known))}")
        for name, kinds in known.items():
            if not isinstance(found[name], kinds) or isinstance(found[name], bool):
                raise ValueError(f"its setting {name!r} is no {kinds[-1].__name__}")
        found["blocks"] = tuple(_block(item) for item in found["blocks"])
        settings = cls(**found)
        settings._check()
        return settings

    def _check(self) -> None:
        """Refuse what no run writes."""
        whole = {"start": (0, 1 << 32), "seed": (0, 1 << 64), "queries": (1, 1 << 16), "probes": (1, 1 << 20), "deferred": (0, 2)}
        for name, (low, high) in whole.items():
            if not low <= getattr(self, name) < high:
                raise ValueError(f"its setting {name!r} is {str(getattr(self, name))[:20]}, out of range")
        for name in ("eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"its setting {name!r} is {str(getattr(self, name))[:20]}, out of range")
        if self.precision not in ("float32", "float64") or (self.noise and sampler_of(self.noise) is None):
            raise ValueError(f"it is of {self.precision[:20]!r} numbers and {self.noise[:20]!r} noise, which this version does not know")
        form = {"paired": bool, "captured": bool, "compiled": bool, "device": str}
        if self.form is not None and {name: type(value) for name, value in self.form.items()} != form:
            raise ValueError("its setting 'form' is none")
        if not self.blocks or len({name for name, _, _ in self.blocks}) < len(self.blocks):
            raise ValueError("its blocks are none, or one is there twice")


def _block(item: Any) -> tuple[str, str, tuple[int, ...]]:
    if isinstance(item, list) and len(item) == 3 and isinstance(item[0], str) and isinstance(item[1], str) and isinstance(item[2], list):
        name, dtype, shape = item
        if dtype in _DTYPES and len(shape) <= 8 and all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
            return name, dtype, tuple(shape)
    raise ValueError(f"{str(item)[:60]!r} is no block: expected [name, type, shape]")


def describe_blocks(blocks: Sequence[Block]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Name, type and shape of each."""
    return tuple((block.name, str(block.dtype).removeprefix("torch."), tuple(block.tensor.shape)) for block in blocks)


def settings_of(optimizer: ZOOptimizer, base: str, first: Settings | None = None) -> Settings:
    """The settings of a run as it stands.

    Args:
        optimizer: The run's optimizer.
        base: Hub id or folder of the base model.
        first: Those that its journal begins with; ``None``: it begins now, with the weights as they are.
    """
    group, space, rule = optimizer.param_groups[0], optimizer.space, optimizer.rule
    return Settings(
        base=first.base if first else base, fingerprint=first.fingerprint if first else fingerprint(space.blocks),
        start=first.start if first else optimizer.steps, blocks=describe_blocks(space.blocks), seed=int(group["seed"]),
        eps=float(group["eps"]), sampler=type(optimizer.sampler).__name__, noise=noise_name(optimizer),
        estimator=type(optimizer.estimator).__name__, queries=optimizer.estimator.queries, probes=len(optimizer.estimator.probes),
        rule=type(rule).__name__, weight_decay=float(getattr(rule, "weight_decay", 0.0)), form=group["form"],
        precision=str(space.compute_dtype).removeprefix("torch."), deferred=int(optimizer.apart),
    )  # fmt: skip


def noise_name(optimizer: ZOOptimizer) -> str:
    """The distribution, where all blocks have one that this package can draw by itself."""
    keys = [(block, Key(0, block.id, 0)) for block in optimizer.space.blocks]
    noises = [optimizer.sampler.noise(block, key) for block, key in keys]
    names = [*_SAMPLERS, *(f"low_rank:{noise.rank}:{noise.window}" for noise in noises if isinstance(noise, LowRankNoise))]
    drawn = {name: sampler_of(name) for name in dict.fromkeys(names)}
    fits = (name for name, own in drawn.items() if own and [own.noise(block, key) for block, key in keys] == noises)
    return next(fits, "")


def sampler_of(noise: str) -> Sampler | None:
    """What draws a distribution of :attr:`Settings.noise`."""
    if found := re.fullmatch(r"low_rank:([1-9]\d{0,3}):([1-9]\d{0,8})", noise):
        return LowRankSampler(*map(int, found.groups()))
    return _SAMPLERS[noise]() if noise in _SAMPLERS else None


def built_in_rule(settings: Settings) -> Rule | None:
    """The rule of a journal, where this package has it."""
    return SGD(settings.weight_decay) if settings.rule == "SGD" else None


def fingerprint(blocks: Sequence[Block]) -> str:
    """BLAKE2b over what tells these weights from others: 32 hexadecimal digits, the same on every device.

    It covers the blocks alone, not the rest of the model: each block's name, type, shape, the sum of the bits of all elements taken as
    integers, and the bits of up to 1,024 elements at even distances. Any change of a single element changes it; an exchange of two
    elements may not.

    Args:
        blocks: The blocks.
    """
    total = hashlib.blake2b(digest_size=16)
    for (name, dtype, shape), block in zip(describe_blocks(blocks), blocks, strict=True):
        total.update(f"{name}\n{dtype}\n{shape}\n".encode())
        total.update(_digest(block.tensor.detach()))
    return total.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    bits = tensor.reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    sample = bits[:: max(1, bits.numel() // _SAMPLES)].to(torch.int64)
    return torch.cat([bits.sum(dtype=torch.int64).view(1), sample]).cpu().numpy().astype("<i8").tobytes()

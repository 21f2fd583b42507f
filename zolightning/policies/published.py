"""Reads the policies that the paper's authors published: pickled ``dict[str, torch.nn.Sequential]`` in a torch archive.

A pickle is a program for Python's unpickler. Here it is only read: a few harmless instructions build a description out of
dictionaries, lists and names, nothing is imported or called, and the numbers then come from the archive's other members.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zolightning.policies.layout import BlockInfo
from zolightning.policies.normalise import Normaliser
from zolightning.policies.pert_nn import INPUTS, PertNN

_LARGEST = 64 << 20
_STORAGES = {"torch FloatStorage": torch.float32, "torch HalfStorage": torch.float16}
_SEQUENTIAL, _LINEAR, _TANH = (f"torch.nn.modules.{name}" for name in ("container Sequential", "linear Linear", "activation Tanh"))
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_GLOBALS = {*_STORAGES, _SEQUENTIAL, _LINEAR, _TANH, _TENSOR, _PARAMETER, "collections OrderedDict", "__builtin__ set"}


class _Global(str):
    """A name that the pickle wants to import."""


class _Module:
    """What the pickle says of a torch module."""

    def __init__(self, kind: _Global) -> None:
        self.kind = kind
        self.state: Any = None


class _Stored(NamedTuple):
    """What the pickle says of a tensor."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any


def import_published(path: str | Path) -> PertNN:
    """Read a published ``.pth`` policy; nothing in the file is run.

    The file names its blocks but not their shapes, so it binds to every model with these names. The normaliser is the published one,
    for 16 examples per step.

    Args:
        path: The file.

    Returns:
        The policy, in float32.

    Raises:
        ValueError: The file is damaged or holds anything but such a policy.

    Example:
        >>> import_published("llama1B_finetuner.pth").save_pretrained("policy.safetensors")  # doctest: +SKIP

    References:
        "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv 2510.00419.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"policy {str(path)!r} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            nets = _nets(archive)
    except zipfile.BadZipFile as error:
        raise ValueError(f"policy {str(path)!r} is no torch archive, or damaged: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if type(error) is ValueError else "its pickle is not that of a policy"
        raise ValueError(f"policy {str(path)!r}: {reason}") from error
    hidden = next(iter(nets.values()))[1].numel()
    policy = PertNN(hidden=hidden, normaliser=Normaliser("published", detached=True)).bind([BlockInfo(name) for name in nets])
    for name, values in zip(policy.per_block, zip(*nets.values(), strict=True), strict=True):
        getattr(policy, name).data.copy_(torch.stack(values))
    return policy


def _nets(archive: zipfile.ZipFile) -> dict[str, tuple[Tensor, ...]]:
    """Weights and biases of both layers, by block."""
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it holds {len(pickles)} pickles instead of one")
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise ValueError("it holds compressed members, which torch does not write")
    if (size := sum(info.file_size for info in members.values())) > _LARGEST:
        raise ValueError(f"it unpacks to {size:,} bytes; more than {_LARGEST:,} is no policy")
    root = pickles[0].removesuffix("/data.pkl")
    if f"{root}/byteorder" in members and archive.read(f"{root}/byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    found = _describe(archive.read(pickles[0]))
    if not (isinstance(found, dict) and found):
        raise ValueError("its pickle is no dictionary of networks")
    nets: dict[str, tuple[Tensor, ...]] = {}
    for name, net in found.items():
        first, last = _layers(net)
        bias = _read(archive, root, first, "bias")
        weight = _read(archive, root, first, "weight")
        out, end = _read(archive, root, last, "weight"), _read(archive, root, last, "bias")
        hidden = next(iter(nets.values()))[1].numel() if nets else bias.numel()
        shapes = [tuple(part.shape) for part in (weight, bias, out, end)]
        if shapes != [(hidden, INPUTS), (hidden,), (1, hidden), (1,)]:
            raise ValueError(f"the network of {name[:80]!r} has tensors of shapes {shapes}")
        nets[name] = weight, bias, out[0], end[0]
    return nets


def _describe(data: bytes) -> Any:
    """What the pickle describes; the only calls in it that are known make an empty dictionary, a set, or a tensor."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    marks: list[int] = []

    def since_mark() -> list[Any]:
        items = stack[(start := marks.pop()) :]
        del stack[start:]
        return items

    instructions: Iterable[tuple[Any, Any, Any]] = pickletools.genops(data)
    for opcode, argument, _ in instructions:
        match opcode.name:
            case "PROTO" | "BINPERSID":  # a storage stays the tuple that names it
                pass
            case "STOP":
                return stack.pop()
            case "GLOBAL" if argument in _GLOBALS:
                stack.append(_Global(argument))
            case "GLOBAL":
                raise ValueError(f"its pickle wants {argument.replace(' ', '.')[:80]!r}, which a policy does not need")
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _put(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                _put(stack[-1], items)
            case "NEWOBJ" | "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_made(name, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case name:
                raise ValueError(f"its pickle has the instruction {name}, which a policy does not need")
    raise ValueError("its pickle has no end")


def _put(target: Any, items: list[Any]) -> None:
    """Set keys and values, which alternate; only text is a key."""
    if type(target) is not dict or len(items) % 2 or not all(type(key) is str for key in items[0::2]):
        raise ValueError("its pickle is not that of a policy")
    target.update(zip(items[0::2], items[1::2], strict=True))


def _made(name: Any, arguments: Any) -> Any:
    """What stands for an object that the pickle wants to be made."""
    if type(name) is _Global and type(arguments) is tuple:
        if name in (_SEQUENTIAL, _LINEAR, _TANH):
            return _Module(name)
        if name == "collections OrderedDict" and not arguments:
            return {}
        if name == "__builtin__ set":
            return None
        if name == _TENSOR:
            return _Stored(*arguments[:4])
        if name == _PARAMETER:
            return arguments[0]
    raise ValueError("its pickle is not that of a policy")


def _layers(net: Any) -> tuple[_Module, _Module]:
    """The two linear layers of a network, after a check of its kind."""
    modules = net.state["_modules"] if type(net) is _Module and net.kind == _SEQUENTIAL else {}
    kinds = [(key, module.kind) for key, module in modules.items()]
    if kinds != [("0", _LINEAR), ("1", _TANH), ("2", _LINEAR)]:
        raise ValueError("one of its networks is not Linear, Tanh, Linear")
    return modules["0"], modules["2"]


def _read(archive: zipfile.ZipFile, root: str, layer: _Module, name: str) -> Tensor:
    """One tensor in float32, after a check that it is contiguous and alone in its storage, and that the storage is there."""
    stored: _Stored = layer.state["_parameters"][name]
    _, storage, key, _, count = stored.storage
    if type(storage) is not _Global or type(key) is not str:
        raise ValueError("one of its tensors has no storage")
    shape = torch.Size(stored.shape)  # refuses anything but integers
    strides = tuple(torch.Size(shape[i + 1 :]).numel() for i in range(len(shape)))
    if stored.stride != strides or stored.offset != 0 or count != shape.numel():
        raise ValueError("one of its tensors is a view of another")
    dtype = _STORAGES[storage]
    data = archive.read(f"{root}/data/{key}")
    if len(data) != shape.numel() * dtype.itemsize or not data:
        raise ValueError(f"one of its tensors has {shape.numel()} elements, but {len(data)} bytes")
    values = torch.frombuffer(bytearray(data), dtype=dtype).view(shape).to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("one of its tensors is not finite")
    return values

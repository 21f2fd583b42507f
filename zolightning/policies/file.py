"""The policy file: safetensors, with a JSON description in the metadata. Data only; nothing in it is ever run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from zolightning.policies.layout import BlockInfo

FORMAT = 1
FILE_NAME = "policy.safetensors"
_KEY = "zolightning_policy"  # one key, so that equal policies have equal bytes
_SUM = "blake2b"  # of description and tensors; safetensors itself does not notice a bit that is changed
_LARGEST = 64 << 20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FIELDS: dict[str, type] = {
    "kind": str, "config": dict, "normaliser": dict, "base_model": str, "blocks": list, "trained": dict, "results": dict,
}  # fmt: skip


def write(path: str | Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    """Write a policy file; equal content gives equal bytes, and a file that stands there is replaced at once or not at all.

    Args:
        path: The file, or a folder to hold ``policy.safetensors``.
        description: Everything but the tensors, as JSON can hold it.
        tensors: The parameters.
        dtype: Type in which they are stored: float32, bfloat16 or float16.

    Returns:
        The file.

    Raises:
        ValueError: A value is not finite in ``dtype``, the description is not JSON, or the type is another one.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype} must be float32, bfloat16 or float16")
    stored = {name: tensors[name].detach().cpu().to(dtype).contiguous() for name in sorted(tensors)}
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name!r} holds values that are not finite in {str(dtype).removeprefix('torch.')}")
    try:
        described = {"format": FORMAT, **description}
        text = json.dumps({**described, _SUM: _sum(described, stored)}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the description of a policy must be plain JSON: {error}") from error
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(save(stored, metadata={_KEY: text}))
    draft.replace(path)
    return path


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a policy file.

    Args:
        path: The file, or a folder that holds ``policy.safetensors``.

    Returns:
        The description, its fields checked and ``blocks`` turned into a tuple of :class:`BlockInfo`, and the tensors as stored.

    Raises:
        ValueError: The file is none, is damaged, too large, or its description does not hold together.

    A file that another program wrote may lack the checksum.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"policy {str(path)!r} does not exist")
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"policy {str(path)!r} has {size:,} bytes; more than {_LARGEST:,} is no policy")
    try:
        # safetensors checks that the tensors fill the file exactly, so none can be larger than it.
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: _tensor(opened, name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"policy {str(path)!r} is no safetensors file, or damaged: {str(error)[:200]}") from error
    if _KEY not in metadata:
        raise ValueError(f"{str(path)!r} holds tensors, but no policy")
    try:
        description = _checked(metadata[_KEY])
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name!r} holds values that are not finite")
        stored = json.loads(metadata[_KEY])
        stated = stored.pop(_SUM, None)
        if stored.keys() - {"format", *_FIELDS} or stated not in (None, _sum(stored, tensors)):
            raise ValueError("it is damaged: its checksum is another one")
    except ValueError as error:
        raise ValueError(f"policy {str(path)!r}: {error}") from error
    return description, tensors


def _sum(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b of the description and the tensors as stored."""
    total = hashlib.blake2b(json.dumps(description, sort_keys=True, allow_nan=False).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _tensor(opened: Any, name: str) -> Tensor:
    """One tensor of an opened file."""
    if (dtype := opened.get_slice(name).get_dtype()) not in ("F32", "BF16", "F16"):
        raise SafetensorError(f"{name[:40]!r} is {dtype}, expected F32, BF16 or F16")
    return opened.get_tensor(name)


def _checked(text: str) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("the description is not JSON") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise ValueError(f"format {str(found)[:20]!r} is not the one that this version reads ({FORMAT})")
    description.pop(_SUM, None)
    for field, kind in _FIELDS.items():
        if not isinstance(description.get(field), kind):
            raise ValueError(f"{field!r} is missing or no {kind.__name__}")
    description["blocks"] = tuple(_block(item) for item in description["blocks"])
    if not description["blocks"]:
        raise ValueError("it is for no blocks")
    if len({block.name for block in description["blocks"]}) < len(description["blocks"]):
        raise ValueError("a block is there twice")
    return description


def _block(item: Any) -> BlockInfo:
    """A block from ``[name, shape]``."""
    if isinstance(item, list) and len(item) == 2 and isinstance(item[0], str):
        name, shape = item
        if shape is None:
            return BlockInfo(name)
        if isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 < n < 1 << 40 for n in shape):
            return BlockInfo(name, tuple(shape))
    raise ValueError(f"{str(item)[:60]!r} is no block: expected [name, shape]")

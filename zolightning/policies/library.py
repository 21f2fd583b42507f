"""Policies by name: a file of the user's, or one that the package ships."""

from __future__ import annotations

from pathlib import Path

from zolightning.policies.base import Policy
from zolightning.policies.published import import_published

_SHIPPED = Path(__file__).parent / "shipped"


def shipped() -> dict[str, Path]:
    """The policies that come with the package, by name."""
    return {path.relative_to(_SHIPPED).with_suffix("").as_posix(): path for path in sorted(_SHIPPED.rglob("*.safetensors"))}


def load_policy(name: str) -> Policy:
    """The policy in a file, or the shipped one of that name.

    Args:
        name: A safetensors file, a folder that holds ``policy.safetensors``, a published ``.pth`` file, or a shipped name.

    Raises:
        ValueError: There is none, or its file is damaged.
    """
    if Path(name).exists():
        return import_published(name) if name.endswith(".pth") else Policy.from_pretrained(name)
    if name in shipped():
        return Policy.from_pretrained(shipped()[name])
    raise ValueError(f"policy {name!r} is neither a file nor a shipped policy ({', '.join(shipped()) or 'none are shipped'})")

"""What a policy knows of a model without its weights: the blocks' names and shapes, and what can be read off them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from zolightning.blocks import Block

Match = Literal["exact", "kind"]

#: The kinds, in the order in which tables and pictures show them.
KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "down", "norm", "bias", "embedding", "head", "other")

# The first pattern that is found in the lower-case name decides. Kinds are parts of a transformer, not names of one family.
_PATTERNS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("norm", r"norm|\bln(_?\w)?\b"),
        ("bias", r"bias$"),
        ("head", r"\b(lm_head|head|score|classifier|embed_out)\b|^output\b"),
        ("embedding", r"embed|\bw[tp]e\b|\bshared\b"),
        ("qkv", r"qkv|query_key_value|\bc_attn\b|attn.*\bin_proj"),
        ("q", r"\b(w?q|query)(_[ab])?(_proj)?\b"),
        ("k", r"\b(w?k|key)(_proj)?\b"),
        ("v", r"\b(w?v|value)(_proj)?\b"),
        ("o", r"\bo_proj\b|att.*\b(w?o|out|out_proj|out_lin|c_proj|dense)\b"),
        ("gate", r"gate_proj|\bw1\b"),
        ("up", r"up_proj|\bfc1\b|\bfc_in\b|\bc_fc\b|h_to_4h|\bw3\b|\bwi\b"),
        ("down", r"down_proj|\bfc2\b|\bfc_out\b|\bc_proj\b|4h_to_h|\bw2\b|\bwo\b"),
    )
)
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class BlockInfo:
    """Name and shape of one block.

    Args:
        name: Canonical name of the block.
        shape: Its shape; ``None`` where it is not known, as in the published files.
        origin: The weight of the base model that the block changes, where it is not that weight; see :class:`~zolightning.blocks.Origin`.

    Example:
        >>> info = BlockInfo("model.layers.3.mlp.down_proj.weight", (576, 1536))
        >>> info.kind, info.layer, info.numel
        ('down', 3, 884736)
    """

    name: str
    shape: tuple[int, ...] | None = None
    origin: BlockInfo | None = None

    @classmethod
    def of(cls, block: Block) -> BlockInfo:
        """What is known of a block."""
        origin = block.origin
        return cls(block.name, tuple(block.tensor.shape), None if origin is None else cls(origin.name, origin.shape))

    @property
    def numel(self) -> int:
        """Number of elements; 1 where the shape is not known."""
        return math.prod(self.shape) if self.shape is not None else 1

    @cached_property
    def kind(self) -> str:
        """Part of the model that the block belongs to, one of :data:`KINDS`, read off the name."""
        name = self.name.lower()
        return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")

    @cached_property
    def layer(self) -> int | None:
        """Index of the layer: the first number among the name's parts; ``None`` outside of the layers."""
        found = _NUMBER.search(self.name)
        return int(found[1]) if found else None

    @cached_property
    def stem(self) -> str:
        """The name without its numbers: equal for the same part of different layers."""
        return _NUMBER.sub(".*", self.name)


def depths(blocks: Sequence[BlockInfo]) -> list[float | None]:
    """Relative depth of each block: 0 in the first layer, 1 in the last, ``None`` outside of the layers."""
    last = max((block.layer for block in blocks if block.layer is not None), default=0)
    return [None if block.layer is None else block.layer / max(last, 1) for block in blocks]


def match_blocks(own: Sequence[BlockInfo], wanted: Sequence[BlockInfo], match: Match = "exact") -> list[int]:
    """For each wanted block, the index of the own block that stands for it.

    A wanted block that the policy does not know by name is looked for as the weight of the base model that it changes. A policy for the
    base model thus serves adapters of its linear maps, and what it says of other weights is left out.

    Args:
        own: The blocks of a policy.
        wanted: The blocks of a model.
        match: ``"exact"``: same names and shapes, in any order. ``"kind"``: the same kind, then the same name apart from the layer's
            number where there is one, then the nearest relative depth.

    Raises:
        ValueError: The blocks differ (with the differences), or a kind is missing.
    """
    if match not in ("exact", "kind"):
        raise ValueError(f"match={match!r} must be 'exact' or 'kind'")
    known = {block.name if match == "exact" else block.stem for block in own}
    strange = [block.origin is not None and (block.name if match == "exact" else block.stem) not in known for block in wanted]
    wanted = [block.origin if other and block.origin else block for block, other in zip(wanted, strange, strict=True)]
    if match == "exact":
        return _match_exactly(own, wanted, whole=not any(strange))
    own_depths, index = depths(own), []
    for block, depth in zip(wanted, depths(wanted), strict=True):
        candidates = [
            (other.stem != block.stem, _distance(own_depths[i], depth), i) for i, other in enumerate(own) if other.kind == block.kind
        ]
        if not candidates:
            kinds = ", ".join(kind for kind in KINDS if any(other.kind == kind for other in own))
            raise ValueError(f"the policy has no block of kind {block.kind!r} for {block.name!r}; it has {kinds}")
        index.append(min(candidates)[2])
    return index


def _distance(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else 2.0
    return abs(a - b)


def _match_exactly(own: Sequence[BlockInfo], wanted: Sequence[BlockInfo], whole: bool) -> list[int]:
    """``whole``: every own block must be wanted."""
    place = {block.name: i for i, block in enumerate(own)}
    names = dict.fromkeys(block.name for block in wanted)
    reshaped = []
    for block in dict.fromkeys(wanted):  # several may change one weight
        shape = own[place[block.name]].shape if block.name in place else block.shape
        if shape is not None and shape != block.shape:
            reshaped.append(f"{block.name!r} {shape} in the policy, {block.shape} here")
    differences = {
        "missing from the policy": [repr(name) for name in names if name not in place],
        "not among the blocks that move": [repr(block.name) for block in own if whole and block.name not in names],
        "of another shape": reshaped,
    }
    if any(differences.values()):
        text = "; ".join(f"{len(items)} {what}: {_short(items)}" for what, items in differences.items() if items)
        raise ValueError(f"the policy is for other blocks ({text}); match='kind' matches by kind and relative depth")
    return [place[block.name] for block in wanted]


def _short(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")

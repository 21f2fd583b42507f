"""Names that are chosen by shell patterns."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence


def matching(names: Sequence[str], kind: str, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The names that match, in their order.

    Args:
        names: All of them.
        kind: What they are names of, for the error.
        include: Only these; empty: all.
        exclude: Not these.

    Raises:
        ValueError: A pattern matches nothing.

    Example:
        >>> matching(["a.weight", "a.bias", "b.weight"], "parameter", ["a.*"], ["*bias"])
        ['a.weight']
    """
    for pattern in (*include, *exclude):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"pattern {pattern!r} matches no {kind}; names look like {next(iter(names), '')!r}")

    def one_of(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return [name for name in names if (not include or one_of(name, include)) and not one_of(name, exclude)]

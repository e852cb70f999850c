"""Compares texts and tokens by where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Span = tuple[int, int]
"""Characters of a text, from the first to before the second."""


def within(places: Iterable[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens stand in a span, or reach into it.

    Args:
        places: where each token's characters stand; a token without any has `(i, i)`.
        spans: of the same text.
    """
    return [
        any(begin < hi and (lo <= begin or lo < end) for lo, hi in spans) for begin, end in places
    ]


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long both begin alike: a completion begins where its prompt alone diverges from it."""
    if one == other[: len(one)]:
        return len(one)
    for i, (x, y) in enumerate(zip(one, other, strict=False)):
        if x != y:
            return i
    return min(len(one), len(other))


def joined(spans: Iterable[Span]) -> list[Span]:
    """Spans of which none begins where the one before it ends."""
    out: list[Span] = []
    for lo, hi in spans:
        if out and out[-1][1] == lo:
            out[-1] = out[-1][0], hi
        else:
            out.append((lo, hi))
    return out

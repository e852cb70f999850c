"""Compares texts and tokens by where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class TextSpan(NamedTuple):
    """A stretch of a text.

    Args:
        begin: number of its first character, from 0.
        end: number of the character behind its last.
    """

    begin: int
    end: int


def within(offsets: Iterable[tuple[int, int]], spans: Sequence[TextSpan]) -> list[bool]:
    """For each token, whether it stands in a span or reaches into one.

    Args:
        offsets: `(begin, end)` of each token's characters, as a fast tokenizer gives them; a token
            without characters has `(i, i)`, and stands where the character i does.
        spans: of the same text.
    """
    return [
        any(begin < span.end and (span.begin <= begin or span.begin < end) for span in spans)
        for begin, end in offsets
    ]


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both sequences begin with alike."""
    if one == other[: len(one)]:
        return len(one)
    for i, (x, y) in enumerate(zip(one, other, strict=False)):
        if x != y:
            return i
    return min(len(one), len(other))


def joined(spans: Iterable[TextSpan]) -> list[TextSpan]:
    """The same stretches, with spans made one where the next begins as the one before it ends.

    Args:
        spans: in the order of the text.
    """
    merged: list[TextSpan] = []
    for span in spans:
        if merged and merged[-1].end == span.begin:
            merged[-1] = TextSpan(merged[-1].begin, span.end)
        else:
            merged.append(span)
    return merged

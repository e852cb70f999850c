"""Tests where tokens stand in a text, and where two texts begin to differ."""

from __future__ import annotations

import pytest

from fedlora.data.spans import TextSpan, common_prefix, joined, within


@pytest.mark.parametrize(
    ("offsets", "spans", "inside"),
    [
        ([(0, 3), (3, 5), (5, 9)], [(3, 5)], [False, True, False]),
        ([(0, 4), (4, 6)], [(3, 5)], [True, True]),  # they reach into it, from either side
        ([(2, 2), (3, 3), (5, 5)], [(3, 5)], [False, True, False]),  # tokens without characters
        ([(0, 3), (3, 5)], [], [False, False]),
        ([(0, 1), (4, 5), (8, 9)], [(0, 2), (8, 10)], [True, False, True]),
    ],
)
def test_tokens_in_spans(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]], inside: list[bool]
) -> None:
    assert within(offsets, [TextSpan(*span) for span in spans]) == inside


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [("abc", "abcd", 3), ("abcd", "abc", 3), ("abx", "abcd", 2), ("", "abc", 0), ("x", "abc", 0)],
)
def test_how_long_two_texts_begin_alike(one: str, other: str, length: int) -> None:
    assert common_prefix(one, other) == length
    assert common_prefix(list(one), list(other)) == length


def test_spans_that_touch_are_one() -> None:
    spans = [TextSpan(0, 2), TextSpan(2, 5), TextSpan(6, 7)]
    assert joined(spans) == [TextSpan(0, 5), TextSpan(6, 7)]
    assert joined([]) == []

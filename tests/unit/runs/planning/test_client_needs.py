"""The longest rows decide how much memory is needed."""

from __future__ import annotations

from fedlora.runs.planning.client_needs import longest_rows


def test_the_longest_rows() -> None:
    rows = [{"input_ids": [0] * n} for n in (3, 9, 1, 5)]
    assert [len(row["input_ids"]) for row in longest_rows(rows, 2)] == [5, 9]
    assert len(longest_rows(rows, 10)) == 4

"""Who holds what, as a table and as bars."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedlora.commands.views.partition import Division, brief, divide, show_partition
from fedlora.config.config import Config
from fedlora.data.raw_data import RawData
from fedlora.errors import InputError
from support.views import bars_of, table_of

ROWS = [{"kind": kind} for kind in ("a", "a", "b", "c")]
RAW = RawData([ROWS[:3], ROWS[3:]], ["", ""], [{"kind": "a"}], "all.csv", [[1, 2, 3], [4]])


def shown(division: Division, width: int = 100) -> str:
    """What stands on a console."""
    console = Console(file=io.StringIO(), width=width)
    show_partition(division, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_are_counted_by_the_column_divided_by() -> None:
    config = Config(partition="dirichlet", partition_column="kind", partition_alpha=0.5)
    division = divide(config, RAW, [4, 2])
    assert division.column == "kind"
    assert division.values == ["a", "b", "c"]
    assert division.counts == [[2, 1, 0], [0, 0, 1]]
    assert division.evaluation == [1, 0, 0]
    assert division.heading == (
        "all.csv: 4 rows, 2 clients, dirichlet (alpha 0.5) by kind, seed 42"
    )
    with pytest.raises(InputError, match="sort"):
        divide(config, RAW, [4, 2], by="sort")


def test_the_table_and_the_bars_have_the_same_numbers() -> None:
    text = shown(divide(Config(), RAW, [4, 2], by="kind"))
    _, body = table_of(text)
    assert body == [
        ["0", "4", "3", "75.0%", "2", "1", "-"],
        ["1", "2", "1", "25.0%", "-", "-", "1"],
        ["eval", "1", "1", "-", "-"],
    ]
    bars = bars_of(text)
    assert {client: rows for client, (_, rows) in bars.items()} == {0: 3, 1: 1}
    first = bars[0][0]
    assert set(first) == {"a", "b"}
    assert first.count("a") == pytest.approx(2 * first.count("b"), abs=1)
    assert len(first) == pytest.approx(3 * len(bars[1][0]), abs=2)


def test_without_a_column_rows_alone_are_shown() -> None:
    division = divide(Config(), RAW, [4, 2])
    assert division.column is None
    assert "kind" not in shown(division)


def test_long_values_are_cut() -> None:
    assert brief("a\n  b") == "a b"
    assert brief("x" * 30) == "x" * 21 + "..."

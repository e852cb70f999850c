"""Who holds what: rows of every client by the values of a column."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.data.label_counts import MOST_VALUES, label_counts
from fedlora.errors import InputError


def config(column: str | None = None) -> Any:
    return SimpleNamespace(
        partition_column=column, label_column_name=None, lora_task_type="CAUSAL_LM"
    )


def raw(*clients: list[str], evaluation: tuple[str, ...] = ()) -> Any:
    parts = [[{"kind": value} for value in values] for values in clients]
    return SimpleNamespace(
        clients=parts,
        train=[row for rows in parts for row in rows],
        eval=[{"kind": value} for value in evaluation],
        names=[f"site {i}" for i in range(len(parts))],
    )


def test_rows_by_value_the_frequent_first() -> None:
    made = label_counts(
        config("kind"), raw(["a", "b", "b"], ["b", "c"], evaluation=("c", "a", "a"))
    )
    assert (made.column, made.values) == ("kind", ["b", "a", "c"])
    assert made.counts == [[2, 1, 0], [1, 0, 1]]
    assert made.evaluation == [0, 2, 1]


def test_one_client_alone() -> None:
    made = label_counts(config("kind"), raw(["a"], ["b", "b"])).of(1)
    assert (made.counts, made.names) == ([[2, 0]], ["site 1"])


def test_the_rarest_values_are_counted_together() -> None:
    values = [str(i) for i in range(MOST_VALUES + 3)]
    made = label_counts(config("kind"), raw(values, values[-1:], evaluation=("elsewhere",)))
    assert len(made.values) == MOST_VALUES
    assert made.values[0] == values[-1]  # it stands there twice
    assert made.values[-1] == "4 others"
    assert made.counts[0] == [1] * (MOST_VALUES - 1) + [4]
    assert made.evaluation[-1] == 1


def test_without_a_column_rows_alone_are_counted() -> None:
    made = label_counts(config(), raw(["a", "b"], ["c"]))
    assert (made.column, made.values, made.counts) == (None, ["rows"], [[2], [1]])
    assert made.evaluation == []


def test_a_column_that_is_asked_for_has_to_be_there() -> None:
    with pytest.raises(InputError, match=r"^'size' is not a column; there are kind$"):
        label_counts(config(), raw(["a"]), by="size")

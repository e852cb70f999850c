"""Columns of rows, and the one type that a column's values have."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.data.rows import check_column, columns_of, no_text, numbered, without_nan
from fedlora.errors import InputError


def test_columns_in_the_order_they_first_appear() -> None:
    assert columns_of([{"b": 1}, {"a": 1, "b": 2}, {"c": 0}]) == ["b", "a", "c"]
    assert columns_of([]) == []


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["a", 1], "row 1 holds text ('a'), row 2 a number (1)"),
        ([None, 1, None, "a", 2], "row 2 holds a number (1), row 4 text ('a')"),
        ([1, True], "row 1 holds a number (1), row 2 true or false (True)"),
        ([[1], {"a": 1}], "row 1 holds a list ([1]), row 2 an object ({'a': 1})"),
        (["x" * 50, [1]], f"row 1 holds text ('{'x' * 26}...), row 2 a list ([1])"),
    ],
)
def test_mixed_types_are_named_with_both_rows(values: list[Any], says: str) -> None:
    with pytest.raises(InputError) as raised:
        check_column(numbered([{"a": value} for value in values]), "a", "the training data")
    assert str(raised.value) == (
        f"the training data: the column a mixes types: {says}; use one type"
    )


@pytest.mark.parametrize(
    "values", [[1, 2.5, -3], ["a", None, "b"], [True, False], [None], [], [[]]]
)
def test_one_type_is_accepted(values: list[Any]) -> None:
    check_column(numbered([{"a": value} for value in values]), "a", "the training data")
    check_column(numbered([{"b": value} for value in values]), "a", "the training data")


def test_nan_is_none_however_deep_it_stands() -> None:
    nan = float("nan")
    value = {"a": [1.0, nan, {"b": nan}], "c": "nan", "d": (nan,)}
    assert without_nan(value) == {"a": [1.0, None, {"b": None}], "c": "nan", "d": [None]}


def test_what_is_no_text_is_named_with_its_value() -> None:
    assert no_text("a", [1]).startswith("the column a holds a list ([1]); expected text")

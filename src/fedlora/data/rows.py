"""Holds what rows are, column by column: missing values, texts, one type for each column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from numbers import Number
from typing import Any
from uuid import UUID

from fedlora.errors import InputError

Row = Mapping[str, Any]
"""Column -> value."""
Rows = list[dict[str, Any]]


def is_null(value: Any) -> bool:
    """Whether a value is missing: None, NaN, or what pandas has for missing dates and numbers."""
    if value is None or isinstance(value, str):
        return value is None
    if isinstance(value, Decimal):
        return value.is_nan()
    if isinstance(value, Number):
        return bool(value != value)
    return type(value).__name__ in ("NaTType", "NAType")


def without_nan(value: Any) -> Any:
    """A value of JSON's or Arrow's kinds, with None for NaN however deep it stands."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if is_null(value) else value


def is_text(value: Any) -> bool:
    """Whether a value can be written into a text: text, a number, a truth value, a date, None."""
    kinds = (str, Number, Decimal, date, time, timedelta, UUID, type(None))
    return isinstance(value, kinds)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns that any row has, in the order of their first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def numbered(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """`(name, row)` of all rows: a message calls them row 1, row 2 ..."""
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def check_column(rows: Sequence[tuple[str, Row]], column: str, data_name: str) -> None:
    """Refuse a column whose values are of several types. Missing values are of any type.

    Args:
        rows: `(name, row)`; a message calls the row by this name.
        column: in all of them, or in some.
        data_name: what all rows together are called in a message.

    Raises:
        InputError: two rows that differ.
    """
    first: tuple[str, str, Any] | None = None
    for row_name, row in rows:
        value = row.get(column)
        if is_null(value):
            continue
        kind = _type_in_words(value)
        if first is None:
            first = row_name, kind, value
        elif kind != first[1]:
            raise InputError(
                f"{data_name}: the column {column} mixes types: {first[0]} holds {first[1]} "
                f"({_short(first[2])}), {row_name} {kind} ({_short(value)}); use one type"
            )


def no_text(column: str, value: Any) -> str:
    """The complaint about a value that should be text and is none."""
    return (
        f"the column {column} holds {_type_in_words(value)} ({_short(value)}); expected text: "
        "write it out in the data, or name other columns with prompt_template and "
        "completion_template"
    )


def _type_in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    """A value in a message, cut to 30 characters."""
    text = repr(value)
    return text if len(text) <= 30 else text[:27] + "..."

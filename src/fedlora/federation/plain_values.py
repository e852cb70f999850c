"""Reads the plain values in a message's body without trusting them: whole numbers, names, tables.

Every function gives the value back where it is what its name says, and raises ValueError else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

LONGEST_NAME = 200
"""Characters of a name."""
LONGEST_TEXT = 2000
"""Characters of any other text."""
MOST_ENTRIES = 2**17
"""Of a table or list."""
LARGEST = 2**53
"""JSON's readers agree on whole numbers below it."""


def whole(value: Any) -> int:
    """A whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LARGEST:
        raise ValueError("no whole number")
    return value


def positive(value: Any) -> int:
    """A whole number from 1 on."""
    if whole(value) < 1:
        raise ValueError("not positive")
    return int(value)


def truth(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def text(value: Any) -> str:
    """Text of bounded length."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise ValueError("no text, or a long one")
    return value


def name(value: Any) -> str:
    """A name: short, printable and not empty."""
    if not 0 < len(text(value)) <= LONGEST_NAME or not value.isprintable():
        raise ValueError("no name")
    return str(value)


def names(value: Any) -> tuple[str, ...]:
    """A list of different names."""
    if not isinstance(value, list) or len(value) > MOST_ENTRIES:
        raise ValueError("no list, or a long one")
    read = tuple(map(name, value))
    if len(set(read)) != len(read):
        raise ValueError("a name stands twice")
    return read


def table(value: Any, reader: Callable[[Any], Any]) -> dict[str, Any]:
    """A table by names, each of its values read by the reader."""
    if not isinstance(value, Mapping) or len(value) > MOST_ENTRIES:
        raise ValueError("no table, or a long one")
    return {text(key): reader(inner) for key, inner in value.items()}


def shapes(value: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors by name."""

    def shape(inner: Any) -> tuple[int, ...]:
        if not isinstance(inner, list) or len(inner) > 4:
            raise ValueError("no shape")
        return tuple(map(whole, inner))

    return table(value, shape)


def module_shapes(value: Any) -> dict[str, tuple[int, int]]:
    """Rows and columns of matrices by name."""
    read = shapes(value)
    if any(len(shape) != 2 or 0 in shape for shape in read.values()):
        raise ValueError("no shape of a matrix")
    return {key: (shape[0], shape[1]) for key, shape in read.items()}


def settings(value: Any) -> dict[str, Any]:
    """Configuration keys: plain values, and lists of them."""

    def setting(inner: Any) -> Any:
        if not isinstance(inner, list):
            return _plain(inner)
        if len(inner) > MOST_ENTRIES:
            raise ValueError("a long list")
        return list(map(_plain, inner))

    return table(value, setting)


def metrics(value: Any) -> dict[str, Any]:
    """Numbers or text by name; of a classifier also numbers by label and name."""

    def metric(inner: Any) -> Any:
        if isinstance(inner, Mapping):
            return table(inner, lambda of_label: table(of_label, _number))
        return _plain(inner)

    return table(value, metric)


def _plain(value: Any) -> Any:
    """Text, a number, a truth value or none."""
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError("no plain value")
    return text(value) if isinstance(value, str) else value


def _number(value: Any) -> float | None:
    if isinstance(value, str | bool):
        raise ValueError("no number")
    number: float | None = _plain(value)
    return number

"""Says what is wrong with a configuration, in words that a person can act on."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError


def members(annotation: Any) -> list[Any]:
    """The members of a union, or the one type there is."""
    union = get_origin(annotation) in (Union, types.UnionType)
    return list(get_args(annotation)) if union else [annotation]


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "none",
}


def expected(annotation: Any) -> str:
    """`int | list[int] | None` -> `a whole number, a list of whole numbers or none`."""
    words = []
    for member in members(annotation):
        if get_origin(member) is Literal:
            words += [str(value) for value in get_args(member)]
        elif get_origin(member) is dict:
            words.append("a table of clients and their settings")
        elif get_origin(member) is list:
            item = _WORDS[get_args(member)[0]].removeprefix("a ")
            words.append(f"a list of {item}s" if item != "text" else "a list of names")
        else:
            words.append(_WORDS.get(member, str(member)))
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


_LIMITS = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be greater than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt:g}",
    "finite_number": "must be a finite number",
}


def readable(
    error: ValidationError, values: Mapping[str, Any], annotation: Callable[[str], Any]
) -> str:
    """One line per key: its value and what is expected, whichever member of a union complained."""
    lines: dict[str, str] = {}
    for item in error.errors():
        key = str(item["loc"][0]) if item["loc"] else ""
        limit = _LIMITS.get(item["type"])
        if item["type"] == "value_error" or not key:
            lines[key] = item["msg"].removeprefix("Value error, ")
        elif limit:
            lines[key] = f"{key}: {item['input']!r} {limit.format(**item.get('ctx', {}))}"
        elif key not in lines:
            lines[key] = f"{key}: {values.get(key)!r}: expected {expected(annotation(key))}"
    return "\n".join(lines.values())

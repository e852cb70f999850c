"""Reads a key's value as it was meant: none as none, one value for a list, text as a share.

A command line has text alone, and YAML has `none` as text; what is unmistakable is taken, and
what would be taken for something else without a word is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from fedlora.config.errors_in_words import expected, members
from fedlora.config.flower_partitioners import division_named


def as_meant(key: str, value: Any, annotation: Any) -> Any:
    """A value before its type is checked.

    Raises:
        ValueError: it is of a kind that the type check would accept and the user cannot have meant.
    """
    refuse_truth(key, value, annotation)
    union = members(annotation)
    if type(None) in union and isinstance(value, str) and value.lower() in ("none", "null"):
        return None
    if value is None and "none" in get_args(annotation):  # what a command line makes of the word
        return "none"
    takes_list = any(get_origin(member) is list for member in union)
    # `[x] or none` can only be meant by x; in `x or [x]` the two are different things.
    if takes_list and value is not None and not isinstance(value, list) and len(union) == 2:
        return [value]
    if not takes_list and isinstance(value, list) and str in union:
        raise ValueError(f"{key}: {value!r}: expected one value; a file pattern has to be quoted")
    if key == "client_overrides" and isinstance(value, Mapping):
        _check_table_of_clients(key, value)
    if key == "sites":
        return _table_of_sites(value)
    if key == "partition":
        return division_named(value)
    if key == "clients_per_round":
        return _number_or_share(value)
    return value


def refuse_truth(key: str, value: Any, annotation: Any) -> None:
    """Refuse true and false where a number is wanted: Python would count with them.

    Raises:
        ValueError: it is one of them, or a list with one of them in it.
    """
    inside = value if isinstance(value, list) else [value]
    if bool not in members(annotation) and any(isinstance(x, bool) for x in inside):
        why = " (a key without a value is true)" if value is True else ""
        raise ValueError(f"{key}: {value!r}: expected {expected(annotation)}{why}")


def _check_table_of_clients(key: str, table: Mapping[Any, Any]) -> None:
    for client, own in table.items():
        if not re.fullmatch(r"\d+", str(client)):
            raise ValueError(f"{key}: {client!r} is no client: expected a number from 0")
        if not isinstance(own, Mapping):
            raise ValueError(f"{key}: client {client}: {own!r}: expected its keys and values")


def _table_of_sites(value: Any) -> Any:
    """Sites as a command line has them, `name=address` each, as a table."""
    if not isinstance(value, str | list):
        return value
    pairs = [str(pair).partition("=") for pair in ([value] if isinstance(value, str) else value)]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"sites: {name!r}: expected name=address")
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("sites: a name is given twice")
    return {name: address for name, _, address in pairs}


def _number_or_share(value: Any) -> Any:
    """The text 1.0 is a share and 1 a number, as they are in YAML."""
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", value):
        try:
            return float(value)
        except ValueError:
            return value
    return value

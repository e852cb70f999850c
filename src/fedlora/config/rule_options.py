"""Reads what aggregation rules say of their options: descriptions, types, who has which."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, get_type_hints

from fedlora.methods import METHODS


def option_line(options: type[Any], key: str) -> str:
    """The description of an option, from the `Args:` of its dataclass's docstring."""
    match = re.search(rf"^\s*{key}: (.+?)(?=^\s*\w+: |\Z)", options.__doc__ or "", re.S | re.M)
    return " ".join(match.group(1).split()) if match else ""


def option_type(key: str) -> Any:
    """The type of an option, from the first rule that has it."""
    hints = (get_type_hints(rule.options) for rule in METHODS.values())
    return next(of_rule[key] for of_rule in hints if key in of_rule)


def rules_by_option() -> dict[str, list[str]]:
    """Every option, and the names of the rules that have it."""
    out: dict[str, list[str]] = {}
    for name, rule in METHODS.items():
        for option in dataclasses.fields(rule.options):
            out.setdefault(option.name, []).append(name)
    return out

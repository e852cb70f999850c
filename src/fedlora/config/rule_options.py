"""Reads the options of aggregation rules: their values, descriptions and types, who has which."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter

from fedlora.config.as_meant import refuse_truth
from fedlora.errors import InputError
from fedlora.methods import METHODS, rule_keys
from fedlora.text import nearest


def split_options(
    values: Mapping[str, Any], options: Any, config_keys: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide flat keys into the configuration's own and those of rules.

    Args:
        values: flat keys and values.
        options: what `method_options` holds; keys of rules in `values` are added to it.
        config_keys: the configuration's own keys.

    Returns:
        The values of the configuration's own keys, and the rule's options.

    Raises:
        InputError: a key belongs to neither, or `options` is no table.
    """
    if not isinstance(options, Mapping):
        raise InputError(
            f"method_options: {options!r}: expected the rule's keys and values; they can be "
            "written as keys of their own"
        )
    of_rules = rule_keys()
    for key in values:
        if key not in config_keys | of_rules:
            raise InputError(
                f"{key}: unknown configuration key" + nearest(key, sorted(config_keys | of_rules))
            )
    own = {key: x for key, x in values.items() if key in config_keys}
    return own, {**options, **{key: x for key, x in values.items() if key not in config_keys}}


def read_options(method: str, values: Mapping[str, Any]) -> Any:
    """A rule's options as its own dataclass.

    Raises:
        ValueError: an unknown option (the message names the nearest) or an impossible value.
    """
    options = METHODS[method].options
    names = [field.name for field in dataclasses.fields(options)]
    for key, value in values.items():
        if key not in names:
            raise ValueError(
                f"{key}: method {method} has no such option; it has " + (", ".join(names) or "none")
            )
        refuse_truth(key, value, get_type_hints(options)[key])
    return TypeAdapter(options).validate_python(dict(values))


def option_line(options: type[Any], key: str) -> str:
    """The description of an option, from the `Args:` of its dataclass's docstring."""
    match = re.search(rf"^\s*{key}: (.+?)(?=^\s*\w+: |\Z)", options.__doc__ or "", re.S | re.M)
    return " ".join(match.group(1).split()) if match else ""


def type_of(model: type[BaseModel], key: str) -> Any:
    """The type of a configuration's key, or of an option from the first rule that has it."""
    if key in model.model_fields:
        return model.model_fields[key].annotation
    hints = (get_type_hints(rule.options) for rule in METHODS.values())
    return next(of_rule[key] for of_rule in hints if key in of_rule)


def rules_by_option() -> dict[str, list[str]]:
    """Every option, and the names of the rules that have it."""
    out: dict[str, list[str]] = {}
    for name, rule in METHODS.items():
        for option in dataclasses.fields(rule.options):
            out.setdefault(option.name, []).append(name)
    return out

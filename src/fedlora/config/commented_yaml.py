"""Writes a configuration as YAML with a comment on every key."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import yaml

from fedlora.config.rule_options import option_line
from fedlora.methods import METHODS

if TYPE_CHECKING:
    from fedlora.config.config import Config


def commented_yaml(config: Config) -> str:
    """One line for each key, the rule's own options last: `key: value  # description`."""
    lines = [
        _line(key, getattr(config, key), field.description)
        for key, field in type(config).model_fields.items()
        if key != "method_options"
    ]
    options, values = METHODS[config.method].options, config.rule_options()
    for field in dataclasses.fields(options):
        value = getattr(values, field.name)
        lines.append(_line(field.name, value, option_line(options, field.name)))
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, description: str | None) -> str:
    return f"{key + ': ' + _scalar(value):<46} # {description}"


def _scalar(value: Any) -> str:
    """A value as it stands on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).replace("\n...", "").strip()

"""Reads configuration keys from YAML files and from the command line, which goes over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedlora.config.arguments import parse_overrides
from fedlora.embedded import CONFIG as EMBEDDED_CONFIG
from fedlora.embedded import EMBEDDED
from fedlora.errors import InputError
from fedlora.methods import METHODS, rule_keys


class _Twice(yaml.constructor.ConstructorError):
    """A key that stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of several equal keys in silence; this refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):  # PyYAML itself refuses lists and tables
                continue
            if key.value in seen:
                raise _Twice(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A configuration file as flat keys.

    Raises:
        InputError: the file is missing, is not YAML (with the line) or holds no mapping.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as a configuration: {why}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        kind = "" if isinstance(error, _Twice) else "broken YAML: "
        raise InputError(f"{path}{where}: {kind}{problem}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML's own constructors: a month 13, a number of 5,000 digits, lists a thousand deep.
        raise InputError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers over earlier ones.

    A later source of data replaces an earlier one, and a later method drops the options of an
    earlier one that it does not have.
    """
    out: dict[str, Any] = {}
    for layer in layers:
        if (rule := METHODS.get(str(layer.get("method")))) is not None:
            its = {f.name for f in dataclasses.fields(rule.options)}
            out = {key: x for key, x in out.items() if key not in rule_keys() - its}
        for one, other in (("train_file", "dataset_name"), ("dataset_name", "train_file")):
            if layer.get(one) and other not in layer:
                out.pop(other, None)
        out.update(layer)
    return out


def settings(arguments: Sequence[str], default: str | None) -> dict[str, Any]:
    """Flat keys from `[CONFIG] [--key value ...]`."""
    source = default
    named = bool(arguments) and not arguments[0].startswith("--")
    if named:
        source, arguments = arguments[0], arguments[1:]
    overrides = parse_overrides(arguments)
    own = (overrides.get(key) for key in ("model_name_or_path", "dataset_name", "train_file"))
    if source == EMBEDDED and not named and any(x not in (None, EMBEDDED) for x in own):
        source = None  # the embedded ranks, division and learning rate belong to what is embedded
    base: dict[str, Any] = {}
    if source is not None:
        base = read_yaml(EMBEDDED_CONFIG if source == EMBEDDED else source)
    return layered(base, overrides)

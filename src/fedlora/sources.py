"""Where configuration keys come from: YAML files, then the command line over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedlora.errors import InputError
from fedlora.methods import METHODS


class _Twice(yaml.constructor.ConstructorError):
    """A key that stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of several equal keys in silence; this refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
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
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def rule_keys() -> set[str]:
    """The names of all options that any rule has."""
    return {f.name for rule in METHODS.values() for f in dataclasses.fields(rule.options)}


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


def parse_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """`--key value ...` as flat keys; several values make a list, none means true.

    Raises:
        InputError: a value without a key, or a key given twice.
    """
    out: dict[str, Any] = {}
    key, values = "", list[str]()

    def close() -> None:
        if key:
            if key in out:
                raise InputError(f"--{key} is given twice")
            plain = [None if v.lower() in ("none", "null") else v for v in values]
            out[key] = True if not plain else plain[0] if len(plain) == 1 else plain

    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            close()
            key, _, value = token[2:].partition("=")
            key, values = key.replace("-", "_"), [value] if value or "=" in token else []
            if not key:
                raise InputError(f"{token!r}: expected --key value")
        elif not key:
            raise InputError(f"{token!r}: expected --key value; the configuration file comes first")
        else:
            values.append(token)
    close()
    return out

"""Reads configuration keys from YAML files and from the command line, which goes over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedlora.demo import CONFIG as EMBEDDED_CONFIG
from fedlora.demo import EMBEDDED
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


def take_flag(arguments: list[str], flag: str) -> bool:
    """Whether `flag` stands among the arguments; it is taken out of them."""
    found = flag in arguments
    if found:
        arguments.remove(flag)
    return found


def take_value(arguments: list[str], flag: str, what: str) -> str | None:
    """The value after `flag`, or None; both are taken out of the arguments.

    Raises:
        InputError: the flag has no value; `what` says what to give.
    """
    for i, token in enumerate(arguments):
        if token == flag or token.startswith(f"{flag}="):
            value = token[len(flag) + 1 :]
            del arguments[i]
            if not value and i < len(arguments) and not arguments[i].startswith("--"):
                value = arguments.pop(i)
            if not value:
                raise InputError(f"{flag}: give {what}")
            return value
    return None

"""Reads a YAML file of keys and values, and says in which line it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fedlora.errors import InputError


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

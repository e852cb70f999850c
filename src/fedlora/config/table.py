"""Reads a table of a YAML file into a strict pydantic model, with a line for every wrong key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedlora.config.as_meant import as_meant
from fedlora.config.errors_in_words import readable
from fedlora.errors import InputError
from fedlora.text import nearest

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
"""Of a model that takes nothing it does not know."""


def table(key: str, value: Any) -> Mapping[str, Any]:
    """The table under a key; empty where the key has no value.

    Raises:
        InputError: it is something else than a table.
    """
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"{key}: {value!r}: expected a table of keys and values")
    return value or {}


def read_table(kind: type[Any], where: str, values: Mapping[str, Any]) -> Any:
    """A table of the file as its model; a value that was read before is taken as it is.

    Args:
        kind: the pydantic model.
        where: before every line of an error, as `bounds: `.
        values: key -> value as it stands in the file, or the model of a table within.

    Raises:
        InputError: a line for every key that cannot be.
    """
    known = [key for key in kind.model_fields if key != "settings"]
    for key in values:
        if key not in known and key != "settings":
            others = f"; there are {', '.join(known)}"
            raise InputError(f"{where}{key}: unknown key" + nearest(str(key), known, others))
    if missing := [k for k, x in kind.model_fields.items() if x.is_required() and k not in values]:
        raise InputError(f"{where}{missing[0]}: is missing; give one")

    def annotation(key: str) -> Any:
        return kind.model_fields[key].annotation

    try:
        meant = {
            key: value if _was_read(value) else as_meant(key, value, annotation(key))
            for key, value in values.items()
        }
        return kind(**meant)
    except ValidationError as error:
        said = readable(error, values, annotation)
        raise InputError("\n".join(where + line for line in said.splitlines())) from None
    except ValueError as error:
        raise InputError(where + str(error)) from None


def _was_read(value: Any) -> bool:
    return isinstance(value, BaseModel | Mapping)

"""Puts the settings of a single client (`client_overrides`) over those of its federation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedlora.config.keys import Mark, keys_marked
from fedlora.errors import InputError
from fedlora.text import nearest

if TYPE_CHECKING:
    from fedlora.config.config import Config


_PRECISIONS = ("load_in_8bit", "load_in_4bit")


def without_other_precision(values: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The values but for another precision of the base than `own` chooses."""
    if not any(own.get(key) for key in _PRECISIONS):
        return values
    return {key: value for key, value in values.items() if key not in _PRECISIONS}


def with_overrides_of(config: Config, client: int) -> Config:
    """The configuration as this client trains by it.

    Args:
        config: of the federation; `client_overrides` is a table, files of it were read.
        client: its number, from 0.

    Raises:
        InputError: a key that a client cannot have of its own, or an impossible value.
    """
    table = config.client_overrides
    assert not isinstance(table, str), "a pattern of files is read by fedlora.config.clients"
    settings = (table or {}).get(client)
    if not settings:
        return config
    allowed = keys_marked(type(config), Mark.OF_CLIENT)
    for key in settings:
        if key not in allowed:
            raise InputError(
                f"client_overrides: client {client}: {key} is not a client's own to set"
                + nearest(key, allowed, f"; it may set {', '.join(allowed)}")
            )
    try:
        values = without_other_precision(config.model_dump(), settings)
        return type(config)(**{**values, "client_overrides": None, **settings})
    except InputError as error:
        raise InputError(f"client_overrides: client {client}: {error}") from None

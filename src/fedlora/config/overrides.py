"""Puts the settings of a single client (`client_overrides`) over those of its federation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.config.keys import Mark, keys_marked
from fedlora.errors import InputError
from fedlora.text import nearest

if TYPE_CHECKING:
    from fedlora.config.config import Config


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
        return type(config)(**{**config.model_dump(), "client_overrides": None, **settings})
    except InputError as error:
        raise InputError(f"client_overrides: client {client}: {error}") from None

"""Makes a site's configuration of a run, of what the server sets and of what is its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedlora.config.config import Config
from fedlora.config.keys import Mark, keys_marked
from fedlora.config.overrides import without_other_precision
from fedlora.config.site import Site
from fedlora.errors import FedloraError, InputError
from fedlora.methods import METHODS

SERVER_KEYS = keys_marked(Config, Mark.OF_CLIENT, Mark.OF_SITES)
"""Keys that a server may set for its sites, beside the rule and its options."""

_AT_MOST = ("num_train_epochs", "max_length", "learning_rate")
_NAMES = ("lora_target_modules", "lora_modules_to_save")


class BoundError(FedloraError):
    """A server asks for what the site does not allow; the text names no data of the site."""


def check_settings(site: Site) -> Config:
    """Refuse impossible values in the file of a site, before any server asks.

    Returns:
        The configuration with the site's own keys alone.

    Raises:
        InputError: which value, and what is expected.
    """
    config = Config(**site.settings)
    if not (config.train_file or config.dataset_name):
        raise InputError("no data: give the site's own rows as train_file or dataset_name")
    return config


def rank_at(site: Site, asked: int) -> int:
    """The rank that is trained at a site where the server asks for this one."""
    return site.rank or min(asked, site.max_rank or asked)


def run_config(
    site: Site, method: str, asked: Mapping[str, Any], client: int, num_clients: int
) -> Config:
    """The configuration that a site takes part in a run by.

    Args:
        site: its file.
        method: the aggregation rule.
        asked: what the server sets: some of `SERVER_KEYS`, and the rule's options.
        client: the site's number, counted from 0.
        num_clients: how many sites there are.

    Raises:
        BoundError: a key is not the server's to set, or its value is beyond a bound of the site.
        InputError: the values are not possible.
    """
    if method not in METHODS:
        raise BoundError(f"method: this site knows no rule {method[:40]!r}")
    if client >= num_clients:
        raise BoundError(f"client {client}, but there are {num_clients} clients, counted from 0")
    options = {field.name for field in dataclasses.fields(METHODS[method].options)}
    for key in asked:
        if key not in options and key not in SERVER_KEYS:
            raise BoundError(f"{key[:40]}: is not a server's to set; a site decides it")
    try:
        server = Config(method=method, **asked)
    except InputError as error:  # it is about the server's values alone
        raise BoundError(str(error)) from None
    _check_bounds(site, server)
    rank = rank_at(site, server.lora_r)
    taken = without_other_precision(dict(asked), site.settings)
    if "model_name_or_path" in site.settings:
        taken.pop("model_revision", None)  # it is of another model
    return Config(
        **{
            **taken,
            "num_threads": 1,
            **site.settings,
            "method": method,
            # How many others there are changes nothing here, and others may join later.
            "num_clients": client + 1,
            "client_ranks": rank,
            "lora_r": rank,
        }
    )


def _check_bounds(site: Site, server: Config) -> None:
    """Hold what the server sets against the site's bounds."""
    bounds = site.bounds
    asked_rank = rank_at(site, server.lora_r)
    if site.rank is None and bounds.lora_r is not None and asked_rank > bounds.lora_r:
        raise _beyond("lora_r", asked_rank, bounds.lora_r)
    for key in _AT_MOST:
        value, most = getattr(server, key), getattr(bounds, key)
        if key == "num_train_epochs" and server.max_steps > 0:
            continue  # steps are counted, not epochs
        if most is not None and value > most:
            raise _beyond(key, value, most)
    if bounds.max_steps is not None and server.max_steps > bounds.max_steps:
        raise _beyond("max_steps", server.max_steps, bounds.max_steps)
    allowed = bounds.lora_target_modules
    if allowed is not None:
        for key in _NAMES:
            _check_modules(key, getattr(server, key), allowed)
    _check_model(site, server)


def check_steps(site: Site, steps: int) -> None:
    """Hold the steps that epochs amount to against the site's bound.

    Raises:
        BoundError: they are more.
    """
    most = site.bounds.max_steps
    if most is not None and steps > most:
        raise BoundError(
            f"max_steps: the epochs asked for are {steps} steps on the rows of this site, which "
            f"allows at most {most}; ask for fewer epochs, or set max_steps"
        )


def _check_modules(key: str, asked: Any, allowed: list[str]) -> None:
    if asked is None and key == "lora_modules_to_save":
        return
    for name in asked if isinstance(asked, list) else [asked or "PEFT's own choice"]:
        if name not in allowed:
            raise BoundError(
                f"{key}: {name[:80]} is asked for, and this site allows {', '.join(allowed)}"
            )


def _check_model(site: Site, server: Config) -> None:
    """A site with a model of its own takes that; another one only where it is allowed by name."""
    name, allowed = server.model_name_or_path, site.bounds.model_name_or_path
    own = site.settings.get("model_name_or_path")
    if own is None and (name is None or name not in (allowed or ())):
        raise BoundError(
            "model_name_or_path: this site names no model, and allows none by the name that the "
            "server asks for; give one in its file"
        )
    if name is not None and name != own and allowed is not None and name not in allowed:
        raise BoundError(
            f"model_name_or_path: {name[:80]} is asked for, and this site allows "
            + ", ".join(allowed)
        )


def _beyond(key: str, asked: float, most: float) -> BoundError:
    return BoundError(f"{key}: {asked:g} is asked for, and this site allows at most {most:g}")

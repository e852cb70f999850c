"""Finds what each client has of its own: its rank, target modules and settings."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from typing import Any

from fedlora.config.config import Config
from fedlora.config.sources import read_yaml
from fedlora.errors import InputError
from fedlora.seeds import SERVER, Purpose, generator
from fedlora.text import natural


def with_overrides_read(config: Config) -> Config:
    """`client_overrides` as a table, where it is a pattern of YAML files: one per client, in order.

    Raises:
        InputError: the pattern matches nothing, or a file is no configuration.
    """
    pattern = config.client_overrides
    if not isinstance(pattern, str):
        return config
    paths = sorted(glob.glob(pattern), key=natural)
    if not paths:
        raise InputError(f"client_overrides: {pattern}: the pattern matches no file")
    table = {client: read_yaml(path) for client, path in enumerate(paths)}
    return config.model_copy(update={"client_overrides": table})


def check_overrides(config: Config, num_clients: int) -> None:
    """Refuse settings of clients that do not exist, or that a client cannot have.

    Raises:
        InputError: which, and why.
    """
    assert not isinstance(config.client_overrides, str)
    for client in config.client_overrides or {}:
        if not 0 <= client < num_clients:
            raise InputError(
                f"client_overrides: client {client}, but there are {num_clients} clients, counted "
                "from 0"
            )
        config.of_client(client)


def client_ranks(config: Config, num_clients: int) -> list[int]:
    """The rank of every client: given, one for all, drawn from `rank_choices`, or its override.

    Raises:
        InputError: a list of another length than there are clients, or a rank given twice.
    """
    given = config.client_ranks
    assert not isinstance(config.client_overrides, str)
    table = config.client_overrides or {}
    own = {k: config.of_client(k).lora_r for k, v in table.items() if "lora_r" in v}
    if isinstance(given, list):
        if len(given) != num_clients:
            raise InputError(
                f"client_ranks: {len(given)} ranks for {num_clients} clients; give one for each"
            )
        for client, rank in own.items():
            if given[client] != rank:
                raise InputError(
                    f"client_overrides: client {client}: lora_r {rank}, but client_ranks says "
                    f"{given[client]}; give the rank in one of them"
                )
        return list(given)
    if config.rank_choices:
        shares = config.rank_shares or [1.0] * len(config.rank_choices)
        rng = generator(config.seed, 0, SERVER, Purpose.RANKS)
        drawn = rng.choice(
            config.rank_choices, size=num_clients, p=[s / sum(shares) for s in shares]
        )
        ranks = [int(rank) for rank in drawn]
    else:
        ranks = [given or config.lora_r] * num_clients
    for client, rank in own.items():
        ranks[client] = rank
    return ranks


def client_modules(
    config: Config, shapes: Mapping[str, tuple[int, int]]
) -> dict[int, frozenset[str]]:
    """The target modules of clients that do not train all of them, by `lora_target_modules`.

    Raises:
        InputError: a client names what is no target module of the run.
    """
    out = {}
    assert not isinstance(config.client_overrides, str)
    for client, own in (config.client_overrides or {}).items():
        if "lora_target_modules" not in own:
            continue
        wanted = config.of_client(client).lora_target_modules
        if wanted in (None, "all-linear"):
            continue
        found = _matching(wanted, shapes)
        if not found:
            ends = dict.fromkeys(name.rpartition(".")[2] for name in shapes)
            raise InputError(
                f"client_overrides: client {client}: lora_target_modules {wanted!r} is not among "
                f"the target modules of the run ({', '.join(ends)})"
            )
        if found != set(shapes):
            out[client] = frozenset(found)
    return out


def _matching(wanted: Any, shapes: Mapping[str, Any]) -> set[str]:
    if isinstance(wanted, str):
        ends = f".{wanted}"
        try:
            return {n for n in shapes if n == wanted or n.endswith(ends) or re.fullmatch(wanted, n)}
        except re.error:
            return set()
    each = [{n for n in shapes if n == name or n.endswith(f".{name}")} for name in wanted]
    return set().union(*each) if all(each) else set()


def settled_overrides(config: Config, ranks: list[int]) -> Config:
    """With the rank of every client in `client_ranks` alone."""
    assert not isinstance(config.client_overrides, str)
    table = {
        client: {key: value for key, value in own.items() if key != "lora_r"}
        for client, own in (config.client_overrides or {}).items()
    }
    return config.model_copy(
        update={
            "client_ranks": ranks,
            "rank_choices": None,
            "rank_shares": None,
            "client_overrides": {c: own for c, own in table.items() if own} or None,
        }
    )

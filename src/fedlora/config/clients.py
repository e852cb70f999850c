"""Finds what each client has of its own: its rank, target modules and settings."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError
from fedlora.seeds import SERVER, Purpose, generator
from fedlora.text import bytes_of, natural


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


def overrides_of(config: Config) -> Mapping[int, Mapping[str, Any]]:
    """The settings of single clients by their numbers, once files of them were read."""
    table = config.client_overrides
    assert not isinstance(table, str), "with_overrides_read comes first"
    return table or {}


def check_overrides(config: Config, num_clients: int) -> None:
    """Refuse settings of clients that do not exist, or that a client cannot have.

    Raises:
        InputError: which, and why.
    """
    for client in overrides_of(config):
        if not 0 <= client < num_clients:
            raise InputError(
                f"client_overrides: client {client}, but there are {num_clients} clients, counted "
                "from 0"
            )
        config.of_client(client)


# --- ranks ---


def client_ranks(config: Config, num_clients: int) -> list[int]:
    """The rank of every client: given, one for all, drawn from `rank_choices`, or its override.

    Raises:
        InputError: a list of another length than there are clients, or a rank given twice.
    """
    own = {
        client: config.of_client(client).lora_r
        for client, settings in overrides_of(config).items()
        if "lora_r" in settings
    }
    if config.client_ranks == "auto":
        raise InputError(
            "client_ranks: auto is decided from the model and the rows; `fedlora plan` says how"
        )
    if isinstance(config.client_ranks, list):
        return _listed_ranks(config.client_ranks, own, num_clients)
    if config.rank_choices:
        ranks = _drawn_ranks(config.rank_choices, config.rank_shares, config.seed, num_clients)
    else:
        ranks = [config.client_ranks or config.lora_r] * num_clients
    return [own.get(client, rank) for client, rank in enumerate(ranks)]


def _listed_ranks(ranks: list[int], own: Mapping[int, int], num_clients: int) -> list[int]:
    """A list with a rank for each client, which its own settings may not contradict."""
    if len(ranks) != num_clients:
        raise InputError(
            f"client_ranks: {len(ranks)} ranks for {num_clients} clients; give one for each"
        )
    for client, rank in own.items():
        if ranks[client] != rank:
            raise InputError(
                f"client_overrides: client {client}: lora_r {rank}, but client_ranks says "
                f"{ranks[client]}; give the rank in one of them"
            )
    return list(ranks)


def _drawn_ranks(
    choices: list[int], shares: list[float] | None, seed: int, num_clients: int
) -> list[int]:
    """Each client's rank, drawn by the seed; without shares all choices are as likely."""
    shares = shares or [1.0] * len(choices)
    rng = generator(seed, 0, SERVER, Purpose.RANKS)
    drawn = rng.choice(choices, size=num_clients, p=[share / sum(shares) for share in shares])
    return [int(rank) for rank in drawn]


def settled_overrides(config: Config, ranks: list[int]) -> Config:
    """The configuration with the rank of every client in `client_ranks`, and nowhere else."""
    others = {
        client: {key: value for key, value in own.items() if key != "lora_r"}
        for client, own in overrides_of(config).items()
    }
    return config.model_copy(
        update={
            "client_ranks": ranks,
            "rank_choices": None,
            "rank_shares": None,
            "client_overrides": {client: own for client, own in others.items() if own} or None,
        }
    )


def client_memories(config: Config, num_clients: int) -> list[int] | None:
    """The memory of every client in bytes; None: `client_memory` says nothing.

    Raises:
        InputError: a list of another length than there are clients.
    """
    memory = config.client_memory
    if memory is None:
        return None
    if isinstance(memory, str):
        return [bytes_of(memory)] * num_clients
    if len(memory) not in (1, num_clients):
        raise InputError(
            f"client_memory: {len(memory)} sizes for {num_clients} clients; give one for each, or "
            "one for all"
        )
    return [bytes_of(text) for text in memory] * (num_clients // len(memory))


# --- target modules ---


def client_modules(
    config: Config, shapes: Mapping[str, tuple[int, int]]
) -> dict[int, frozenset[str]]:
    """The target modules of clients that do not train all of them, by `lora_target_modules`.

    Args:
        config: of the run.
        shapes: of the run's target modules, by their full names.

    Raises:
        InputError: a client names what is no target module of the run.
    """
    out = {}
    for client, own in overrides_of(config).items():
        if "lora_target_modules" not in own:
            continue
        wanted = config.of_client(client).lora_target_modules
        if wanted is None or wanted == "all-linear":
            continue
        named = _named_among(wanted, shapes)
        if not named:
            ends = dict.fromkeys(name.rpartition(".")[2] for name in shapes)
            raise InputError(
                f"client_overrides: client {client}: lora_target_modules {wanted!r} is not among "
                f"the target modules of the run ({', '.join(ends)})"
            )
        if named != set(shapes):
            out[client] = frozenset(named)
    return out


def _named_among(wanted: str | list[str], names: Iterable[str]) -> set[str]:
    """The full names that are meant: by their ends, or by a regular expression over all of a name.

    Empty where one of several names means nothing.
    """

    def ends_in(end: str) -> set[str]:
        return {name for name in names if name == end or name.endswith(f".{end}")}

    if isinstance(wanted, str):
        try:
            return ends_in(wanted) | {name for name in names if re.fullmatch(wanted, name)}
        except re.error:
            return set()
    each = [ends_in(end) for end in wanted]
    return set().union(*each) if all(each) else set()

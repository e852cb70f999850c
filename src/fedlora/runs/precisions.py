"""Loads the base once more for each precision in which single clients hold it.

In a simulation all clients of one precision share one base; the run's own evaluates.
"""

from __future__ import annotations

from collections.abc import Callable

from fedlora.config.clients import overrides_of
from fedlora.config.config import Config
from fedlora.model.base import BaseModel
from fedlora.model.quantisation import bits_of
from fedlora.model.quantised_linear import Bits


def load_other_bases(
    config: Config, load: Callable[[Config], BaseModel]
) -> tuple[dict[int, BaseModel], list[str]]:
    """The bases of clients that hold theirs in another precision than the run does.

    Args:
        config: of the run, with the settings of single clients read.
        load: makes a base by a configuration.

    Returns:
        Client number -> its base, and what was decided, in words.
    """
    bases: dict[Bits | None, BaseModel] = {}
    of_client: dict[int, BaseModel] = {}
    choices = []
    for client in sorted(overrides_of(config)):
        own = config.of_client(client)
        bits = bits_of(own)
        if bits == bits_of(config):
            continue
        if bits not in bases:
            keys = {"load_in_8bit": own.load_in_8bit, "load_in_4bit": own.load_in_4bit}
            bases[bits] = load(config.model_copy(update=keys))
        of_client[client] = bases[bits]
    for bits, base in bases.items():
        clients = [str(client) for client, own_base in of_client.items() if own_base is base]
        held = f"in {bits} bits" if bits else "as it is"
        choices.append(
            f"base of client {', '.join(clients)}: held {held}, in memory beside the run's"
        )
    return of_client, choices


def bits_held(config: Config) -> set[Bits]:
    """In which bits the run or any of its clients holds its base; empty: none is quantised."""
    own = [config, *(config.of_client(client) for client in overrides_of(config))]
    return {bits for bits in map(bits_of, own) if bits is not None}

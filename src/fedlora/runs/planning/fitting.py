"""Chooses ranks and micro-batches that fit into each client's memory (`client_ranks: auto`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.config.clients import client_memories, overrides_of
from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.text import human_bytes

Need = Callable[[int, int, int], int]
"""`(client, micro-batch, rank)` -> bytes that its training takes."""

MICRO_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Keys of a client that are set where its memory asks for smaller micro-batches."""


@dataclass(frozen=True)
class Fit:
    """What a client trains with.

    Args:
        rank: of its adapter.
        batch: samples of a micro-batch.
        accumulation: micro-batches of a step.
    """

    rank: int
    batch: int
    accumulation: int


def fit(
    rank: int, batch: int, accumulation: int, need: Callable[[int, int], int], room: int
) -> Fit:
    """The highest rank, and for it the largest micro-batch, that fit.

    A micro-batch is divided by a whole number, and as many more make a step, so that the steps of
    the optimiser stay as they were. The rank, which decides what can be learnt and takes far less
    memory, is halved last.

    Args:
        rank, batch, accumulation: what is wanted.
        need: `(micro-batch, rank)` -> bytes.
        room: bytes that there are.

    Raises:
        ValueError: not even one sample and rank 1 fit; its argument is what they take, in bytes.
    """
    sizes = [size for size in range(batch, 0, -1) if batch % size == 0]
    while True:
        if need(1, rank) <= room:
            size = next(size for size in sizes if need(size, rank) <= room)
            return Fit(rank, size, accumulation * batch // size)
        if rank == 1:
            raise ValueError(need(1, 1))
        rank //= 2


def with_fitting_ranks(config: Config, num_clients: int, need: Need) -> tuple[Config, list[str]]:
    """The configuration with `client_ranks: auto` decided, and what was chosen, in words.

    Args:
        config: of the run.
        num_clients: in it.
        need: see `Need`.

    Raises:
        InputError: a client's memory does not hold the model and one sample.
    """
    memories = client_memories(config, num_clients)
    if config.client_ranks != "auto" or memories is None:
        return config, []
    ranks, overrides = list[int](), dict[int, dict[str, Any]]()
    for client, room in enumerate(memories):
        chosen = _fit_of(config.of_client(client), client, need, room)
        ranks.append(chosen.rank)
        overrides[client] = _settings(config, client, chosen)
    changed = {client: own for client, own in overrides.items() if own}
    decided = config.model_copy(update={"client_ranks": ranks, "client_overrides": changed or None})
    return decided, _in_words(config, decided)


def _fit_of(own: Config, client: int, need: Need, room: int) -> Fit:
    try:
        return fit(
            own.lora_r,
            own.per_device_train_batch_size,
            own.gradient_accumulation_steps,
            lambda size, rank: need(client, size, rank),
            room,
        )
    except InputError:  # which is a ValueError too: what is needed cannot be told
        raise
    except ValueError as error:
        raise InputError(
            f"client_memory: client {client} has {human_bytes(room)}, but one sample at rank 1 "
            f"takes {human_bytes(error.args[0])}; try gradient_checkpointing: true, "
            "load_in_4bit: true, a smaller max_length, dtype: bfloat16 or a smaller model"
        ) from None


def _settings(config: Config, client: int, chosen: Fit) -> dict[str, Any]:
    """The client's own settings, with the micro-batch where it is another than everybody's."""
    own: Mapping[str, Any] = overrides_of(config).get(client, {})
    settings = {key: value for key, value in own.items() if key != "lora_r"}
    if chosen.batch != config.of_client(client).per_device_train_batch_size:
        settings |= dict(zip(MICRO_BATCH, (chosen.batch, chosen.accumulation), strict=True))
    return settings


def _in_words(before: Config, after: Config) -> list[str]:
    ranks = after.client_ranks
    assert isinstance(ranks, list)
    by_size = dict[tuple[int, int], list[int]]()
    lines = ["ranks that fit into client_memory: " + ", ".join(map(str, ranks))]
    for client in range(len(ranks)):
        old, new = before.of_client(client), after.of_client(client)
        size, number = new.per_device_train_batch_size, new.gradient_accumulation_steps
        if old.per_device_train_batch_size != size:
            by_size.setdefault((number, size), []).append(client)
    for (number, size), clients in by_size.items():
        who = f"client {clients[0]}" if len(clients) == 1 else f"{len(clients)} clients"
        lines.append(f"{who} with {number} micro-batches of {size} in a step")
    return lines

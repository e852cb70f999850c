"""Describes a worker process as its pool sees it, and ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from fedlora.federation.messages import Broadcast
from fedlora.lowrank import Deltas

Clients = Sequence[Broadcast]
"""Broadcasts of clients that train in one pass."""


def with_stand_ins(broadcast: Broadcast, merged: Deltas, *, shared: bool) -> Broadcast:
    """A broadcast without the numbers of what the pool has merged for all workers.

    A worker needs of these updates no more than that they are the same as for other clients.

    Args:
        broadcast: of a client.
        merged: module -> what stands in the place of its updates, the same for all clients.
        shared: whether the adapter lies frozen under all clients and was merged too.
    """
    base_delta = {name: merged.get(name, x) for name, x in broadcast.base_delta.items()}
    if not shared:
        return replace(broadcast, base_delta=base_delta)
    adapter = {
        name: x if x is broadcast.leading.get(name) else merged.get(name, x)
        for name, x in broadcast.adapter.items()
    }
    return replace(broadcast, base_delta=base_delta, adapter=adapter)


@dataclass(frozen=True)
class Task:
    """Clients that a worker is asked to train.

    Args:
        clients: what they were sent.
        attempt: how often they were asked before, counted from 0.
    """

    clients: Clients
    attempt: int = 0


@dataclass
class PoolProcess:
    """A worker process as the pool sees it.

    Args:
        process: of the operating system.
        connection: the pool's end.
        round: of the groups that it holds.
        known: names of these groups.
        task: what it is at; None: nothing that is waited for.
        stops_by: a moment of `time.monotonic()` after which it is replaced unless it has stopped
            what it was at; None: it was not told to stop.
    """

    process: Any
    connection: Connection
    round: int = 0
    known: frozenset[str] = frozenset()
    task: Task | None = None
    stops_by: float | None = None


def end(worker: PoolProcess, patience: float) -> None:
    """Close a worker's connection, and end its process where it does not end by itself."""
    worker.connection.close()
    worker.process.join(patience)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def ending(exitcode: int | None) -> str:
    """How a process has ended, in words."""
    if exitcode is not None and exitcode < 0:
        memory = " (memory ran out?)" if exitcode == -9 else ""
        return f"was killed by signal {-exitcode}{memory}"
    return f"has ended with exit code {exitcode}"

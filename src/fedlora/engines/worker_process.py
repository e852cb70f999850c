"""Serves a pool's requests in a process of its own: reads a message, trains, answers, again.

A worker process keeps nothing between two requests but the base model, the clients' rows and the
groups of tensors of the present round. Whatever else a client needs comes with the request, so any
worker of the pool can train any client.
"""

from __future__ import annotations

import ctypes
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from fedlora.client.cohort import out_of_memory
from fedlora.client.local_training import StepCallback
from fedlora.client.worker import Worker
from fedlora.errors import FedloraError
from fedlora.federation.envelope import Header, Message, check_header, decode, encode
from fedlora.federation.exchange import Agreement, client_start
from fedlora.federation.messages import Broadcast
from fedlora.federation.wire import Groups, read_train, trained_message
from fedlora.lowrank import Deltas

STEP = "step"
"""The kind of a message that tells of a client's step."""
FAILED = "failed"
"""The kind of a message that says why the clients of a request were not trained."""
STOP = "stop"
"""The kind of the pool's message that calls off the request a worker is at."""
STOPPED = "stopped"
"""The kind of a worker's answer to it."""

MERGED = "merged"
"""In a request: whether the pool has merged what lies frozen beside the base for all workers."""

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class _CalledOff(BaseException):
    """The pool wants no more of a request; no `except Exception` of a user's training stops it."""


@dataclass
class _Round:
    """What a worker holds of the present round."""

    number: int = 0
    groups: Groups = field(default_factory=dict)


def serve(
    connection: Connection, make_worker: Callable[[], Worker], header: Header, close: Sequence[Any]
) -> None:
    """Answer requests until the other side closes the connection.

    Args:
        connection: to the pool.
        make_worker: makes what trains; called once.
        header: what a request's header has to hold, but for its round and attempt.
        close: what this process has inherited and must not keep open: the pool's ends of the
            connections, whose closing tells other workers that the pool is gone.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's to handle; it closes us
    for inherited in close:
        inherited.close()
    torch.set_num_threads(1)
    worker = make_worker()
    held = _Round()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = decode(connection.recv_bytes())
            if message.header.kind != STOP:  # else it was answered before that came
                _answer(connection, worker, message, header, held)
            del message  # what it holds beyond the groups of the round
            give_back_memory()


def _answer(
    connection: Connection, worker: Worker, message: Message, header: Header, held: _Round
) -> None:
    """Train the clients that a request names, and send what became of them.

    Whether the pool has called it off is looked for at every step.
    """
    asked = message.header
    check_header(asked, replace(header, round=asked.round, attempt=asked.attempt))
    if asked.round != held.number:
        held.number, held.groups = asked.round, {}
    broadcasts, states = read_train(message, held.groups)
    worker.states.clear()
    worker.states.update(states)
    if message.body.get(MERGED):
        worker.base.adopt_merged(frozen_for_all(broadcasts, worker.agreement))

    def on_step(client: int) -> StepCallback:
        def tell(step: int, steps: int, loss: float, tokens: int) -> None:
            body = {"client": client, "step": step, "steps": steps, "loss": loss, "tokens": tokens}
            connection.send_bytes(encode(Message(replace(asked, kind=STEP), body)))
            if connection.poll():  # nothing else is sent to a worker that is at work
                decode(connection.recv_bytes())
                raise _CalledOff

        return tell

    try:
        updates = [trained.update for trained in worker.handle_together(broadcasts, on_step)]
        reply = trained_message(asked, updates, worker.states)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except _CalledOff:
        reply = Message(replace(asked, kind=STOPPED), {})
    except Exception as error:
        reply = _failure(asked, error)
    connection.send_bytes(encode(reply))


def frozen_for_all(broadcasts: Sequence[Broadcast], agreement: Agreement) -> list[Deltas]:
    """What lies frozen beside the base under all of these clients, as a worker loads it.

    Returns:
        Nothing where they were sent different things.
    """
    if not broadcasts:
        return []
    first = broadcasts[0]
    shared = client_start(first, agreement).shared
    for other in broadcasts[1:]:
        if not _same(other.base_delta, first.base_delta):
            return []
        if shared and not _same(other.adapter, first.adapter):
            return []
    return [first.base_delta, shared]


def _same(one: Deltas, other: Deltas) -> bool:
    """Whether two tables hold the very same updates."""
    return one is other or (
        one.keys() == other.keys() and all(one[name] is other[name] for name in one)
    )


def _failure(asked: Header, error: Exception) -> Message:
    """Says why nobody was trained, and in what words the pool is to raise it."""
    body = {
        "memory": out_of_memory(error),
        "mistake": isinstance(error, FedloraError),
        "reason": str(error)
        if isinstance(error, FedloraError)
        else f"{type(error).__name__}: {error}",
        "trace": "".join(traceback.format_exception(error)),
    }
    return Message(replace(asked, kind=FAILED), body)


def has_stopped(connection: Connection, stops_by: float) -> bool:
    """Read what a worker still sends of a request that was called off, until it is idle.

    Args:
        connection: the pool's end.
        stops_by: a moment of `time.monotonic()` after which it is not waited for.

    Returns:
        Whether it is idle: not where it goes on, or has ended.
    """
    try:
        while connection.poll(max(0.0, stops_by - time.monotonic())):
            if decode(connection.recv_bytes()).header.kind != STEP:
                return True  # it has stopped, or was done just before
    except (EOFError, OSError):
        pass
    return False


def give_back_memory() -> None:
    """Give the system the memory that training has freed, where the C library can: a worker that
    waits shall hold nothing of its own."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def end_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is gone, however that ended.

    Elsewhere a worker ends when it next finds the connection closed: after the step it is in.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

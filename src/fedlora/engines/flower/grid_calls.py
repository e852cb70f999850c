"""Sends messages over a Flower grid, and brings the replies one by one as they arrive.

Flower's own `send_and_receive` holds all replies of a round until the last one is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from enum import Enum
from logging import WARNING
from typing import Any

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from fedlora.engines.flower.probe import Probe

_SOONEST, _LATEST = 0.02, 1.0  # seconds between two looks for replies


class NoReply(Enum):
    """Why there is no reply to a message."""

    LATE = "it did not answer by the deadline"
    NOT_TAKEN = "Flower did not take the message; the ServerApp's log says more"
    LOST = "Flower has lost the message, or its answer"


def replies(
    grid: Grid,
    messages: Iterable[Message],
    deadline: float | None,
    lock: threading.Lock | None = None,
    *,
    probes: bool = False,
) -> Iterator[tuple[Message, Message | NoReply]]:
    """Push messages one at a time, and pull their replies one at a time.

    A reply is told apart by the id of the message that it answers: Flower replies itself, under a
    number of its own, in the place of a node that is gone.

    Args:
        grid: reaches the nodes.
        messages: to them.
        deadline: a moment of `time.monotonic()` after which no reply is waited for; None: as long
            as it takes.
        lock: held while the grid is used, where several threads use it.
        probes: find out what Flower has lost (`fedlora.engines.flower.probe`). The nodes have to be
            SuperNodes whose ClientApp answers queries.

    Yields:
        Each message and its reply, or why there is none.
    """
    held = lock or nullcontext()
    waiting = dict[str, tuple[Message, Probe | None]]()
    for message in messages:
        with held:
            id = _push(grid, message)
        if id is None:
            yield message, NoReply.NOT_TAKEN
        else:
            waiting[id] = message, Probe(grid, message) if probes else None
    pause = _SOONEST
    while waiting:
        came = False
        for id, (message, probe) in list(waiting.items()):
            with held:
                reply = _pull(grid, id)
                if reply is None and probe is not None and probe.finds_idle():
                    reply = _pull(grid, id) or NoReply.LOST  # it may have come just now
            if reply is not None:
                came = True
                del waiting[id]
                yield message, reply
        if not waiting or (deadline is not None and time.monotonic() >= deadline):
            break
        pause = _SOONEST if came else min(_LATEST, 1.5 * pause)
        left = pause if deadline is None else max(0.0, deadline - time.monotonic())
        time.sleep(min(pause, left))
    for message, _ in waiting.values():
        yield message, NoReply.LATE


def _push(grid: Grid, message: Message) -> str | None:
    """Push a message: its id, or None where that cannot be done.

    A SuperLink that is killed and started again refuses the rest of a message that it has half of.
    """
    try:
        return next(iter(grid.push_messages([message])), None) or None
    except RunNotRunningException:
        raise
    except Exception as error:
        log(WARNING, "a message could not be pushed: %s: %s", type(error).__name__, error)
        return None


def _pull(grid: Grid, id: str) -> Message | NoReply | None:
    """The reply to a message; None: it is not there yet."""
    try:
        return next(iter(grid.pull_messages([id])), None)
    except RunNotRunningException:
        raise
    except Exception as error:
        log(WARNING, "a reply could not be pulled: %s: %s", type(error).__name__, error)
        return NoReply.LOST


class StreamingGrid(Grid):  # type: ignore[misc]
    """A grid whose `send_and_receive` yields replies as they arrive, for `Strategy.start`.

    Args:
        grid: the one that Flower hands to a ServerApp; everything else is its own.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._nodes = dict[str, int]()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages, and yield replies as they come; see `replies`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._nodes.clear()
        for message, reply in replies(self.grid, messages, deadline):
            if isinstance(reply, Message):
                answered = reply.metadata.reply_to_message_id
                self._nodes[answered] = message.metadata.dst_node_id
                yield reply

    def node_of(self, reply: Message) -> int:
        """The id of the node whose message is replied to."""
        metadata = reply.metadata
        return int(self._nodes.get(metadata.reply_to_message_id, metadata.src_node_id))

    def set_run(self, run: Any) -> None:
        """Set the run."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """Run information."""
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Create a message; Flower deprecates it."""
        return self.grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """The ids of the nodes that are connected."""
        return list(self.grid.get_node_ids())

    def get_nodes(self) -> Iterable[Any]:
        """The nodes that are connected."""
        return list(self.grid.get_nodes())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages."""
        return list(self.grid.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull what has come."""
        return list(self.grid.pull_messages(message_ids))


def answering_node(grid: Grid | None, reply: Message) -> int:
    """The id of the node that a reply is of, or in whose place Flower replies."""
    if isinstance(grid, StreamingGrid):
        return grid.node_of(reply)
    return int(reply.metadata.src_node_id)

"""Sends messages over a Flower grid, and brings the replies one by one as they arrive.

Flower's own `send_and_receive` holds all replies of a round until the last one is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

_SOONEST, _LATEST = 0.02, 1.0  # seconds between two looks for replies


def replies(
    grid: Grid,
    messages: Iterable[Message],
    deadline: float | None,
    lock: threading.Lock | None = None,
) -> Iterator[tuple[Message, Message | None]]:
    """Push messages one at a time, and pull their replies one at a time.

    A reply is told apart by the id of the message that it answers: Flower replies itself, under a
    number of its own, in the place of a node that is gone.

    Args:
        grid: reaches the nodes.
        messages: to them; one that cannot be pushed is answered with None at once.
        deadline: a moment of `time.monotonic()` after which no reply is waited for; None: as long
            as it takes.
        lock: held while the grid is used, where several threads use it.

    Yields:
        Each message and its reply; None where there was none.
    """
    lock = lock or threading.Lock()
    waiting = dict[str, Message]()
    for message in messages:
        with lock:
            ids = list(grid.push_messages([message]))
        if ids and ids[0]:
            waiting[ids[0]] = message
        else:
            yield message, None
    pause = _SOONEST
    while waiting:
        came = False
        for id in list(waiting):
            with lock:
                pulled = list(grid.pull_messages([id]))
            for reply in pulled:
                came = True
                yield waiting.pop(id), reply
        if not waiting or (deadline is not None and time.monotonic() >= deadline):
            break
        pause = _SOONEST if came else min(_LATEST, 1.5 * pause)
        left = pause if deadline is None else max(0.0, deadline - time.monotonic())
        time.sleep(min(pause, left))
    for message in waiting.values():
        yield message, None


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
            if reply is not None:
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

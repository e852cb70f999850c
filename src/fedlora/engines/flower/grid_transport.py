"""Carries messages to sites over Flower: one Message to a node for each, the replies as they come.

It is a `fedlora.engines.transport.Transport`, whose sites are the workers beside the SuperNodes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.engines.carrier import SiteError
from fedlora.engines.flower.failures import site_error
from fedlora.engines.flower.grid_calls import NoReply, replies
from fedlora.engines.flower.nodes import wait_for_nodes
from fedlora.engines.flower.packets import call_content, read_answer, read_name, ttl_of
from fedlora.engines.transport import Answer
from fedlora.errors import InputError

_QUERY = 60.0  # seconds in which a node that is started again tells its name
_NEAR = 2.0  # seconds before a deadline in which a message may have expired


class GridTransport:
    """Reaches the workers of sites through a Flower grid.

    Flower gives a node one message at a time, so a site cannot be told to stop what it trains: what
    is called off ends at its own deadline, or when it is done, and its answer is dropped.

    Args:
        grid: as Flower hands it to a ServerApp; it may be used by many threads.
        least: nodes to wait for.
        timeout: seconds in which they have to connect, and to tell their names: one that still
            trains for a run that was lost does so afterwards.
        probes: find out what Flower has lost; the nodes have to be SuperNodes, not simulated ones.

    Raises:
        InputError: too few connect, one does not tell its name, or two have the same.
    """

    def __init__(self, grid: Grid, least: int, timeout: float, *, probes: bool = False) -> None:
        self.grid, self._probes = grid, probes
        self._lock = threading.Lock()  # of the grid
        self._asking = threading.Lock()  # of the nodes' names
        self._nodes = dict[str, int]()
        self._ask_names(wait_for_nodes(grid, least, timeout), max(timeout, _QUERY), required=True)

    # --- who is there ---

    def _ask_names(self, ids: Sequence[int], seconds: float, *, required: bool) -> None:
        """Ask nodes for the names of their sites.

        Args:
            ids: of the nodes.
            seconds: after which nobody is waited for.
            required: all of them have to tell.

        Raises:
            InputError: of nodes that are required.
        """
        messages = [
            Message(RecordDict(), id, MessageType.QUERY, ttl=seconds, group_id="0") for id in ids
        ]
        deadline = time.monotonic() + seconds
        for message, reply in replies(self.grid, messages, deadline, self._lock):
            id = message.metadata.dst_node_id
            name = _name_in(reply, seconds)
            if isinstance(name, SiteError):
                if required:
                    raise InputError(f"node {id}: {name.reason}")
            elif name in self._nodes and required:
                raise InputError(
                    f"nodes {self._nodes[name]} and {id} are both of site {name}; give every site "
                    "a name of its own, and one SuperNode"
                )
            else:
                self._nodes[name] = id

    def names(self) -> Sequence[str]:
        """The sites of all nodes, in the order of their names."""
        return sorted(self._nodes)

    def _node_of(self, name: str) -> int | None:
        """The node of a site that is connected; a SuperNode that was restarted may be another."""
        with self._asking:
            with self._lock:
                present = set(self.grid.get_node_ids())
            if name in self._nodes and self._nodes[name] not in present:
                unknown = sorted(present - set(self._nodes.values()))
                self._ask_names(unknown, _QUERY, required=False)
            id = self._nodes.get(name)
            return id if id in present else None

    # --- messages ---

    def send(
        self, messages: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Answer]]:
        """Send every site its message; see `fedlora.engines.transport.Transport.send`."""
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        to_send, names = list[Message](), dict[int, str]()
        for name, message in messages.items():
            id = self._node_of(name)
            if id is None:
                yield name, SiteError("absent", "its SuperNode is not connected")
                continue
            names[id] = name
            content = call_content(message, seconds)
            to_send.append(Message(content, id, MessageType.TRAIN, ttl=ttl_of(seconds)))
        answers = replies(self.grid, to_send, deadline, self._lock, probes=self._probes)
        for message, reply in answers:
            yield names[message.metadata.dst_node_id], _answer_in(reply, deadline)

    def cancel(self, names: Sequence[str]) -> None:
        """Nothing: a node that is at a message takes no other."""

    def status(self, name: str) -> Mapping[str, Any]:
        """Nothing is known: a node that is at a message takes no other."""
        return {}

    def close(self) -> None:
        """The grid is Flower's to close."""


def _answer_in(reply: Message | NoReply, deadline: float | None) -> Answer:
    """What a site answers, or what became of its message.

    A message whose ttl is the deadline may expire a moment before that.
    """
    is_over = deadline is not None and time.monotonic() >= deadline - _NEAR
    if isinstance(reply, NoReply):
        return SiteError("deadline" if reply is NoReply.LATE else "died", reply.value)
    if not reply.has_error():
        return read_answer(reply.content)
    error = site_error(reply.error)
    return SiteError("deadline", error.reason) if is_over and error.kind == "died" else error


def _name_in(reply: Message | NoReply, seconds: float) -> str | SiteError:
    if reply is NoReply.LATE:
        reason = f"it did not tell its site's name within {seconds:.0f} s; does it train elsewhere?"
        return SiteError("deadline", reason)
    if isinstance(reply, NoReply):
        return SiteError("died", reply.value)
    return site_error(reply.error) if reply.has_error() else read_name(reply.content)

"""Finds out who the nodes of a Flower federation are: waits for them, and asks what they train."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.engines.flower.failures import in_words
from fedlora.engines.flower.grid_calls import NoReply, replies
from fedlora.engines.flower.peft_records import ADAPTER
from fedlora.errors import InputError
from fedlora.text import natural

_LOOK = 1.0  # seconds between two looks at who is there


@dataclass(frozen=True)
class Node:
    """A node that trains an adapter of its own rank.

    Args:
        id: Flower's number of the node.
        name: that it gives itself, by which nodes are numbered; "" where it has none.
        rank: of its adapter.
        scale: LoRA's s, `alpha / r`.
        num_examples: rows it trains on.
    """

    id: int
    name: str
    rank: int
    scale: float
    num_examples: int


def wait_for_nodes(grid: Grid, number: int, seconds: float) -> list[int]:
    """The nodes that are there, once there are enough, in the order of their ids.

    Raises:
        InputError: there are too few when the time is over.
    """
    deadline = time.monotonic() + seconds
    while True:
        ids = sorted(grid.get_node_ids())
        if len(ids) >= number:
            return ids
        if time.monotonic() >= deadline:
            raise InputError(
                f"{len(ids)} of {number} nodes are connected after {seconds:g} s; start the others "
                "(flower-supernode), or ask for fewer"
            )
        time.sleep(min(_LOOK, max(0.0, deadline - time.monotonic())))


def ask_nodes(
    grid: Grid, ids: Collection[int], seconds: float
) -> tuple[list[Node], dict[int, str]]:
    """Ask nodes by a QUERY what they train.

    Args:
        grid: reaches them.
        ids: of the nodes.
        seconds: after which nobody is waited for.

    Returns:
        Those that have answered, in the order of their names; and of the others why not.
    """
    messages = [
        Message(RecordDict(), node, MessageType.QUERY, ttl=seconds, group_id="0")
        for node in sorted(ids)
    ]
    nodes, problems = list[Node](), dict.fromkeys(ids, "it did not answer in time")
    for message, reply in replies(grid, messages, time.monotonic() + seconds):
        id = message.metadata.dst_node_id
        if isinstance(reply, NoReply):
            continue
        if reply.has_error():
            problems[id] = in_words(reply.error)
            continue
        try:
            nodes.append(_read(id, reply))
        except ValueError as error:
            problems[id] = str(error)
    nodes.sort(key=lambda node: (natural(node.name), node.id))
    for node in nodes:
        problems.pop(node.id, None)
    return nodes, problems


def _read(id: int, reply: Message) -> Node:
    """What a node tells of itself.

    Raises:
        ValueError: its answer is not that of `describe`.
    """
    record = reply.content.config_records.get(ADAPTER, ConfigRecord())
    try:
        node = Node(
            id,
            str(record.get("name", "")),
            int(record["rank"]),
            float(record["scale"]),
            int(record["num-examples"]),
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "its answer to the query is not that of fedlora.engines.flower.describe; its ClientApp "
            "has to return that from @app.query()"
        ) from None
    if node.rank < 1 or not 0 < node.scale < float("inf") or node.num_examples < 0:
        raise ValueError("it tells a rank, scale or number of examples that cannot be")
    return node

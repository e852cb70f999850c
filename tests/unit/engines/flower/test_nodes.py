"""Who the nodes of a strategy's federation are."""

from __future__ import annotations

import pytest
from flwr.app import Message

from fedlora.engines.flower.nodes import ask_nodes, wait_for_nodes
from fedlora.errors import InputError
from support.flower_clients import moving_clients
from support.flower_grid import InProcessGrid

NODES = [
    {"partition-id": 10, "rank": 2, "scale": 1.0, "rows": 5},
    {"partition-id": 9, "rank": 4, "scale": 0.5, "rows": 7},
    {"partition-id": 2, "rank": 0, "scale": 1.0, "rows": 7},
]


def test_nodes_are_in_the_order_of_their_names_and_who_cannot_be_is_told() -> None:
    grid = InProcessGrid(moving_clients([]), NODES)
    nodes, problems = ask_nodes(grid, list(grid.get_node_ids()), 10)
    assert [(n.name, n.rank, n.scale, n.num_examples) for n in nodes] == [
        ("9", 4, 0.5, 7),
        ("10", 2, 1.0, 5),
    ]
    assert problems == {986: "it tells a rank, scale or number of examples that cannot be"}


def test_flower_s_errors_are_told_of_the_node_they_are_about() -> None:
    def errors(message: Message) -> int | None:
        return 1 if message.metadata.dst_node_id == 993 else None

    grid = InProcessGrid(moving_clients([]), NODES[:2], errors=errors)
    nodes, problems = ask_nodes(grid, list(grid.get_node_ids()), 10)
    assert [node.name for node in nodes] == ["10"]
    assert problems == {993: "its ClientApp cannot be loaded (code 1)"}


def test_nodes_that_do_not_come_are_told() -> None:
    grid = InProcessGrid(moving_clients([]), NODES)
    assert wait_for_nodes(grid, 3, 0.0) == [986, 993, 1000]
    with pytest.raises(InputError, match="3 of 5 nodes are connected after 0 s"):
        wait_for_nodes(grid, 5, 0.0)

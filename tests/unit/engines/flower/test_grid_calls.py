"""Replies of a grid, one by one."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import RunNotRunningException

from fedlora.engines.flower.grid_calls import NoReply, StreamingGrid, answering_node, replies
from support.flower_grid import InProcessGrid, LosingGrid

app = ClientApp()


@app.query()
def answer(message: Message, context: Context) -> Message:
    """A node that has nothing else to do."""
    return Message(RecordDict(), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A node that takes as long as its configuration says."""
    time.sleep(float(context.node_config["seconds"]))
    return Message(RecordDict(), reply_to=message)


def grid_of(*seconds: float, gone: Iterable[int] = ()) -> InProcessGrid:
    nodes = [{"seconds": s} for s in seconds]
    return InProcessGrid(
        app, nodes, errors=lambda m: 5 if m.metadata.dst_node_id in set(gone) else None
    )


def messages_to(grid: InProcessGrid) -> list[Message]:
    return [Message(RecordDict(), id, MessageType.TRAIN) for id in grid.get_node_ids()]


def test_replies_come_as_nodes_are_done() -> None:
    grid = grid_of(0.4, 0.0)
    came = [m.metadata.dst_node_id for m, _ in replies(grid, messages_to(grid), None)]
    assert came == [993, 1000]


def test_who_is_late_is_told_without_a_reply() -> None:
    grid = grid_of(30.0, 0.0)
    deadline = time.monotonic() + 0.3
    came = {m.metadata.dst_node_id: r for m, r in replies(grid, messages_to(grid), deadline)}
    assert came[1000] is NoReply.LATE
    assert isinstance(came[993], Message)


@pytest.mark.parametrize("taken", [[], [None], ObjectPushError("object", 1, "session")])
def test_a_message_that_cannot_be_pushed_is_told_at_once(taken: Any) -> None:
    class Full(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            if isinstance(taken, Exception):
                raise taken
            return taken  # type: ignore[no-any-return]

    grid = Full(app, [{"seconds": 0}])
    assert [r for _, r in replies(grid, messages_to(grid), None)] == [NoReply.NOT_TAKEN]


def test_a_run_that_was_stopped_asks_nobody_any_more() -> None:
    class Stopped(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            raise RunNotRunningException

    grid = Stopped(app, [{"seconds": 0}])
    with pytest.raises(RunNotRunningException):
        list(replies(grid, messages_to(grid), None))


def test_a_message_that_flower_has_lost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.engines.flower.probe.FIRST", 0.1)
    grid = LosingGrid(app, [{"seconds": 0}, {"seconds": 0}], lost=[993])
    came = {
        m.metadata.dst_node_id: r for m, r in replies(grid, messages_to(grid), None, probes=True)
    }
    assert isinstance(came[1000], Message)
    assert came[993] is NoReply.LOST


def test_flower_s_reply_is_of_the_node_whose_message_it_answers() -> None:
    grid = StreamingGrid(grid_of(0.0, 0.0, gone=[993]))
    came = {answering_node(grid, r): r for r in grid.send_and_receive(messages_to(grid.grid))}
    assert came[993].has_error()
    assert came[993].metadata.src_node_id == 1
    assert not came[1000].has_error()

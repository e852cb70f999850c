"""Questions that find out whether a node is through with a message."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedlora.engines.flower.probe import Probe
from support.flower_grid import InProcessGrid

app = ClientApp()


@app.query()
def answer(message: Message, context: Context) -> Message:
    """A node that has nothing else to do."""
    return Message(RecordDict(), reply_to=message)


def probe_over(grid: InProcessGrid) -> Probe:
    return Probe(grid, Message(RecordDict(), 1000, MessageType.TRAIN))


def soon(ready: Callable[[], bool]) -> bool:
    until = time.monotonic() + 5
    while not ready() and time.monotonic() < until:
        time.sleep(0.01)
    return time.monotonic() < until


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions are asked without a pause."""
    monkeypatch.setattr("fedlora.engines.flower.probe.FIRST", 0.0)


def test_nobody_is_asked_before_it_is_time() -> None:
    grid = InProcessGrid(app, [{}])
    assert not probe_over(grid).finds_idle()
    assert grid.pushed == []


@pytest.mark.usefixtures("at_once")
def test_a_node_that_answers_is_idle() -> None:
    grid = InProcessGrid(app, [{}])
    assert soon(probe_over(grid).finds_idle)
    assert [m.metadata.message_type for m in grid.pushed] == [MessageType.QUERY]


@pytest.mark.usefixtures("at_once")
def test_an_error_of_flower_s_tells_nothing_and_another_question_is_asked() -> None:
    grid = InProcessGrid(app, [{}], errors=lambda message: 3)
    probe = probe_over(grid)
    assert soon(lambda: probe.finds_idle() or len(grid.pushed) >= 3)
    assert not probe.finds_idle()


@pytest.mark.usefixtures("at_once")
def test_a_grid_that_fails_is_asked_later(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = InProcessGrid(app, [{}])
    probe = probe_over(grid)
    with monkeypatch.context() as patch:
        patch.setattr(grid, "push_messages", lambda messages: 1 / 0)
        assert not probe.finds_idle()
    assert soon(probe.finds_idle)

"""The transport over a grid: sites by their names, answers, and what became of a call."""

from __future__ import annotations

import time
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.engines.carrier import SiteError
from fedlora.engines.flower.grid_transport import GridTransport
from fedlora.engines.flower.packets import answer_content, name_content, read_call
from fedlora.errors import InputError
from support.flower_grid import InProcessGrid, LosingGrid

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """The name that its configuration gives."""
    return Message(name_content(str(context.node_config["name"])), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """The message behind the name, as slowly as its configuration says."""
    time.sleep(float(context.node_config.get("seconds", 0)))
    if context.node_config.get("busy"):
        return Message(answer_content(SiteError("busy", "it trains")), reply_to=message)
    data, _ = read_call(message.content)
    name = str(context.node_config["name"]).encode()
    return Message(answer_content(name + b" got " + data), reply_to=message)


def transport_over(*nodes: dict[str, Any], **own: Any) -> GridTransport:
    return GridTransport(InProcessGrid(app, nodes, **own), len(nodes), 5.0)


def test_sites_are_asked_by_their_names() -> None:
    transport = transport_over({"name": "beta"}, {"name": "alpha"})
    assert transport.names() == ["alpha", "beta"]
    answers = dict(transport.send({"beta": b"1", "alpha": b"2"}, None))
    assert answers == {"beta": b"beta got 1", "alpha": b"alpha got 2"}


def test_what_became_of_a_call_is_told() -> None:
    transport = transport_over(
        {"name": "alpha", "busy": True}, {"name": "beta", "seconds": 30}, {"name": "gamma"}
    )
    gone = next(iter(transport.grid.get_node_ids()))
    answers = dict(transport.send({"alpha": b"", "beta": b""}, time.monotonic() + 0.3))
    kinds = {name: x.kind for name, x in answers.items() if isinstance(x, SiteError)}
    assert kinds == {"alpha": "busy", "beta": "deadline"}
    del transport.grid.contexts[gone]
    (answer,) = [x for _, x in transport.send({"alpha": b""}, None)]
    assert isinstance(answer, SiteError)
    assert answer.kind == "absent"


def test_a_supernode_that_was_restarted_is_found_again() -> None:
    transport = transport_over({"name": "alpha"}, {"name": "beta"})
    contexts = transport.grid.contexts
    contexts[5] = contexts.pop(1000)
    contexts[5].node_id = 5
    assert dict(transport.send({"alpha": b"1"}, None)) == {"alpha": b"alpha got 1"}


def test_flower_s_errors_are_told_in_words() -> None:
    def errors(message: Message) -> int | None:
        return 8 if message.metadata.message_type == "train" else None

    transport = transport_over({"name": "alpha"}, errors=errors)
    (answer,) = [x for _, x in transport.send({"alpha": b""}, None)]
    assert isinstance(answer, SiteError)
    assert answer.kind == "died"


def test_a_message_that_expires_is_lost_unless_the_deadline_is_near() -> None:
    def errors(message: Message) -> int | None:
        return 3 if message.metadata.message_type == "train" else None

    transport = transport_over({"name": "alpha"}, errors=errors)
    for seconds, kind in ((60.0, "died"), (1.0, "deadline")):
        ((_, answer),) = transport.send({"alpha": b""}, time.monotonic() + seconds)
        assert isinstance(answer, SiteError)
        assert answer.kind == kind


def test_a_message_that_flower_has_lost_can_be_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.engines.flower.probe.FIRST", 0.1)
    grid = LosingGrid(app, [{"name": "alpha"}], lost=[1000])
    transport = GridTransport(grid, 1, 5.0, probes=True)
    ((_, answer),) = transport.send({"alpha": b"1"}, None)
    assert isinstance(answer, SiteError)
    assert answer.kind == "died"
    assert dict(transport.send({"alpha": b"1"}, None)) == {"alpha": b"alpha got 1"}


def test_two_nodes_of_one_site_and_nodes_without_a_name_are_refused() -> None:
    with pytest.raises(InputError, match="both of site alpha"):
        transport_over({"name": "alpha"}, {"name": "alpha"})
    with pytest.raises(InputError, match="node 1000: its ClientApp raised an exception"):
        transport_over({"no name": 1})


def test_nothing_is_told_to_a_node_that_trains() -> None:
    transport = transport_over({"name": "alpha"})
    transport.cancel(["alpha"])
    assert transport.status("alpha") == {}
    transport.close()

"""The ClientApp: it carries bytes to the worker of its site, and needs no torch."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora.engines import carrier
from fedlora.engines.carrier import SiteError
from fedlora.engines.flower import client_app
from fedlora.engines.flower.packets import call_content, read_answer, read_name


@pytest.fixture(autouse=True)
def _task() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def context_of(**node_config: Any) -> Context:
    return Context(5, 7, dict(node_config), RecordDict(), {})


def asked(kind: str, content: RecordDict, context: Context) -> RecordDict:
    """What the app replies."""
    message = Message(content, 7, kind)
    message.metadata.__dict__["_message_id"] = "asked"
    return client_app.app(message, context).content


def test_the_worker_is_called_with_the_message_and_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def call(address: str, message: bytes, *, seconds: float | None = None) -> bytes:
        calls.append((address, message, seconds))
        return b"answer"

    monkeypatch.setattr(carrier, "call", call)
    content = call_content(b"message", 9.0)
    reply = asked(MessageType.TRAIN, content, context_of(socket="/run/a.sock"))
    assert read_answer(reply) == b"answer"
    assert calls == [("/run/a.sock", b"message", 9.0)]


def test_a_worker_that_is_not_there_is_told() -> None:
    content = call_content(b"message", None)
    error = read_answer(asked(MessageType.TRAIN, content, context_of(socket="/nowhere/a.sock")))
    assert isinstance(error, SiteError)
    assert error.kind == "absent"


def test_a_site_is_named_by_its_node_or_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    query = MessageType.QUERY
    assert read_name(asked(query, RecordDict(), context_of(name="clinic"))) == "clinic"
    monkeypatch.setattr(carrier, "status", lambda address: {"site": f"of {address}"})
    assert read_name(asked(query, RecordDict(), context_of(socket="x"))) == "of x"


def test_a_node_that_does_not_say_where_its_worker_is_called_is_told() -> None:
    error = read_name(asked(MessageType.QUERY, RecordDict(), context_of(**{"partition-id": 0})))
    assert isinstance(error, SiteError)
    assert "--node-config" in error.reason

"""Messages reach sites by their names, and answers come as they come."""

from __future__ import annotations

import threading
import time

import pytest

from fedlora.engines import carrier
from fedlora.engines.carrier import SiteError
from fedlora.engines.transport import SocketTransport


def test_every_site_is_called_at_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    first_waits, calls = threading.Event(), list[tuple[str, bytes, float | None]]()

    def call(address: str, message: bytes, *, seconds: float | None = None) -> bytes:
        calls.append((address, message, seconds))
        if address == "/a":
            first_waits.wait(30)
        if address == "/c":
            raise SiteError("refused", "too much")
        return b"from " + message

    monkeypatch.setattr(carrier, "call", call)
    transport = SocketTransport({"c": "/c", "a": "/a", "b": "/b"})
    assert transport.names() == ["a", "b", "c"]
    answers = transport.send({"a": b"1", "b": b"2", "c": b"3"}, None)
    came = dict([next(answers), next(answers)])
    assert came.keys() == {"b", "c"}, "who is done first is brought first"
    first_waits.set()
    came |= dict(answers)
    assert (came["a"], came["b"]) == (b"from 1", b"from 2")
    refused = came["c"]
    assert isinstance(refused, SiteError)
    assert (refused.kind, refused.reason) == ("refused", "too much")
    assert sorted(calls) == [("/a", b"1", None), ("/b", b"2", None), ("/c", b"3", None)]
    transport.close()


def test_a_site_says_what_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def status(address: str) -> dict[str, str]:
        if address == "/b":
            raise SiteError("absent", "nobody")
        return {"state": "idle"}

    monkeypatch.setattr(carrier, "status", status)
    transport = SocketTransport({"a": "/a", "b": "/b"})
    assert transport.status("a") == {"state": "idle"}
    assert transport.status("b") == {}


def test_who_has_not_answered_by_the_deadline_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = threading.Event()

    def call(address: str, message: bytes, *, seconds: float | None = None) -> bytes:
        assert seconds == 0.0
        done.wait(30)
        return b""

    monkeypatch.setattr(carrier, "call", call)
    monkeypatch.setattr("fedlora.engines.transport._GRACE", 0.0)
    deadline = time.monotonic() - 1
    ((name, answer),) = SocketTransport({"a": "/a"}).send({"a": b""}, deadline)
    done.set()
    assert name == "a"
    assert isinstance(answer, SiteError)
    assert answer.kind == "deadline"

"""Calls that come over a socket are answered, and what is no call is refused before its payload."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.engines import carrier
from fedlora.engines.carrier import SiteError
from fedlora.engines.frames import Timer, receive, send
from fedlora.engines.site_listener import MOST_CALLS, Listener


class Echo:
    """In a worker's place: answers a message with itself, reversed."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.stopped = threading.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()

    def handle(self, message: bytes, seconds: float | None) -> bytes:
        self.goes_on.wait(10)
        if message == b"no":
            raise SiteError("refused", "it says no")
        return message[::-1] + str(seconds).encode()

    def status(self) -> dict[str, Any]:
        return {"state": "idle"}

    def cancel(self) -> None:
        self.called.append("cancel")

    def stop(self) -> None:
        self.stopped.set()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Echo, Listener]]:
    """The address of a socket, who answers there, and its listener."""
    path, echo = str(tmp_path / "s"), Echo()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        listener = Listener(server, echo, None)
        listener.start()
        yield path, echo, listener


Served = tuple[str, Echo, Listener]


def test_every_call(served: Served) -> None:
    path, echo, listener = served
    assert carrier.call(path, b"abc", seconds=7) == b"cba7"
    assert carrier.call(path, b"") == b"None"
    assert carrier.status(path) == {"state": "idle"}
    carrier.cancel(path)
    assert echo.called == ["cancel"]
    with pytest.raises(SiteError, match="it says no"):
        carrier.call(path, b"no")
    carrier.stop(path)
    assert echo.stopped.wait(5)
    listener.finish(5)


def test_status_is_told_while_messages_are_worked_on(served: Served) -> None:
    path, echo, _ = served
    echo.goes_on.clear()
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: answers.append(carrier.call(path, b"x"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert carrier.status(path) == {"state": "idle"}
    echo.goes_on.set()
    for thread in threads:
        thread.join(10)
    assert answers == [b"xNone"] * 3


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ({"call": "dance"}, "mistake", "knows no such call"),
        ({}, "mistake", "knows no such call"),
        ({"call": "message", "seconds": "soon"}, "mistake", "seconds: expected a number"),
        ({"call": "message", "seconds": True}, "mistake", "seconds: expected a number"),
    ],
)
def test_what_is_no_call_is_refused_unread(
    served: Served, text: dict[str, Any], kind: str, said: str
) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(served[0])
        encoded = json.dumps(text).encode()
        connection.sendall(len(encoded).to_bytes(8, "little") + encoded)  # and no payload
        answer, _ = receive(connection, Timer.of(5))
    assert (answer["ok"], answer["kind"], said in answer["reason"]) == (False, kind, True)


def test_connections_that_break_off_do_not_use_it_up(served: Served) -> None:
    for _ in range(2 * MOST_CALLS):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(served[0])
            connection.sendall(b"\x05")
    assert carrier.call(served[0], b"ab") == b"baNone"


def test_a_port_wants_its_token(tmp_path: Path) -> None:
    path = tmp_path / "door"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        path.write_text(json.dumps({"port": port, "token": "right"}))
        Listener(server, Echo(), "right").start()
        assert carrier.call(str(path), b"ab") == b"baNone"
        path.write_text(json.dumps({"port": port, "token": "wrong"}))
        with pytest.raises(SiteError, match="token is not the worker's"):
            carrier.status(str(path))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            send(connection, {"call": "status"}, b"", Timer.of(5))
            assert receive(connection, Timer.of(5))[0]["kind"] == "refused"

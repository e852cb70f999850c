"""The caller's side of a worker's socket, against a socket that answers what it is told to."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.engines import carrier
from fedlora.engines.frames import Timer, receive, send

Answer = Callable[[socket.socket, dict[str, Any], bytes], None]


@pytest.fixture
def socket_that(tmp_path: Path) -> Iterator[Callable[[Answer], str]]:
    """Makes a socket that answers one call as it is told; gives its address."""
    opened: list[tuple[socket.socket, threading.Thread]] = []

    def make(answer: Answer) -> str:
        path = str(tmp_path / f"{len(opened)}.sock")
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                answer(connection, *receive(connection, Timer.of(5)))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        opened.append((server, thread))
        return path

    yield make
    for server, thread in opened:
        thread.join(5)
        server.close()


Sockets = Callable[[Answer], str]


def saying(text: Mapping[str, Any], payload: bytes = b"") -> Answer:
    """Answers always the same."""
    return lambda connection, _text, _payload: send(connection, text, payload, Timer())


def test_a_message_and_its_answer(socket_that: Sockets) -> None:
    def answer(connection: socket.socket, text: dict[str, Any], payload: bytes) -> None:
        assert text == {"call": "message", "token": None, "seconds": 60}
        send(connection, {"ok": True}, payload[::-1], Timer())

    assert carrier.call(socket_that(answer), b"abc", seconds=60) == b"cba"


def test_status_is_what_the_worker_says(socket_that: Sockets) -> None:
    said = {"state": "training", "step": 3}
    assert carrier.status(socket_that(saying({"ok": True}, json.dumps(said).encode()))) == said


@pytest.mark.parametrize(("function", "name"), [(carrier.cancel, "cancel"), (carrier.stop, "stop")])
def test_calls_without_a_message(
    socket_that: Sockets, function: Callable[[str], None], name: str
) -> None:
    calls = []

    def answer(connection: socket.socket, text: dict[str, Any], payload: bytes) -> None:
        calls.append((text["call"], payload))
        send(connection, {"ok": True}, b"", Timer())

    function(socket_that(answer))
    assert calls == [(name, b"")]


def test_what_the_worker_says_instead_is_raised(socket_that: Sockets) -> None:
    no = {"ok": False, "kind": "busy", "reason": "it trains round 3"}
    with pytest.raises(carrier.SiteError) as error:
        carrier.call(socket_that(saying(no)), b"")
    assert (error.value.kind, error.value.reason) == ("busy", "it trains round 3")


@pytest.mark.parametrize(
    "answer", [{}, {"ok": 1}, {"ok": False}, {"ok": False, "kind": "odd", "reason": "x"}]
)
def test_another_program_s_socket_is_a_mistake(
    socket_that: Sockets, answer: Mapping[str, Any]
) -> None:
    with pytest.raises(carrier.SiteError, match="no worker of fedlora") as error:
        carrier.status(socket_that(saying(answer)))
    assert error.value.kind == "mistake"


def test_a_worker_that_ends_has_died(socket_that: Sockets) -> None:
    address = socket_that(lambda connection, text, payload: None)
    with pytest.raises(carrier.SiteError, match="before it had answered") as error:
        carrier.call(address, b"")
    assert error.value.kind == "died"


def test_no_answer_in_time_is_a_deadline(
    socket_that: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(carrier, "_GRACE", 0.01)
    address = socket_that(lambda connection, text, payload: over.wait(5) and None)
    with pytest.raises(carrier.SiteError, match="did not answer") as error:
        carrier.call(address, b"", seconds=0.01)
    over.set()
    assert error.value.kind == "deadline"


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(carrier.SiteError, match="fedlora worker --site") as error:
        carrier.status(str(tmp_path / "none.sock"))
    assert error.value.kind == "absent"


def test_a_socket_that_was_left_behind(tmp_path: Path) -> None:
    path = str(tmp_path / "left.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
    with pytest.raises(carrier.SiteError, match="not running") as error:
        carrier.status(path)
    assert error.value.kind == "absent"


def test_a_file_that_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("notes")
    with pytest.raises(carrier.SiteError, match="no worker has written") as error:
        carrier.status(str(path))
    assert error.value.kind == "absent"

"""Frames: what is sent is received, and bytes that are no frame are refused before they cost."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.engines.frames import (
    Door,
    FrameError,
    Timer,
    connected,
    read_door,
    receive,
    receive_text,
    send,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


Pair = tuple[socket.socket, socket.socket]


@pytest.mark.parametrize("payload", [b"", b"\x00" * 3, bytes(range(256))])
def test_a_call_arrives_as_it_was_sent(pair: Pair, payload: bytes) -> None:
    send(pair[0], {"call": "status", "seconds": None}, payload, Timer())
    assert receive(pair[1], Timer()) == ({"call": "status", "seconds": None}, payload)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"", "ended"),
        (b"\x05\x00", "ended"),
        ((9).to_bytes(8, "little") + b"{}", "ended"),
        ((2**62).to_bytes(8, "little"), "at most"),
        ((2).to_bytes(8, "little") + b"[]", "named values"),
        ((3).to_bytes(8, "little") + b"\xff\xfe\x00", "not JSON"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_frame_is_refused(pair: Pair, sent: bytes, why: str) -> None:
    pair[0].sendall(sent)
    pair[0].close()
    with pytest.raises(FrameError, match=why):
        receive_text(pair[1], Timer())


def test_a_payload_beyond_the_limit_is_refused_unread(pair: Pair) -> None:
    send(pair[0], {}, b"x" * 100, Timer())
    with pytest.raises(FrameError, match="100 bytes, where at most 99"):
        receive(pair[1], Timer(), most=99)


def test_waiting_ends_with_the_timer(pair: Pair) -> None:
    with pytest.raises(TimeoutError):
        receive(pair[1], Timer.of(0.01))
    with pytest.raises(TimeoutError):
        send(pair[0], {}, b"", Timer.of(0.0))


def test_a_door_names_port_and_token(tmp_path: Path) -> None:
    path = tmp_path / "clinic.sock"
    assert read_door(str(path)) is None
    path.write_text(json.dumps({"port": 4321, "token": "t"}))
    assert read_door(str(path)) == Door(4321, "t")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"port": 70000, "token": "t"}', '{"port": "1"}'])
def test_any_other_file_is_no_door(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(FrameError, match="no worker has written"):
        read_door(str(path))


def test_through_a_door_one_is_connected_and_knows_the_token(tmp_path: Path) -> None:
    path = tmp_path / "clinic.sock"
    with socket.create_server(("127.0.0.1", 0)) as server:
        path.write_text(json.dumps({"port": server.getsockname()[1], "token": "t"}))
        connection, token = connected(str(path), Timer())
        with connection:
            assert token == "t"


def test_a_socket_needs_no_token(tmp_path: Path) -> None:
    path = str(tmp_path / "clinic.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        connection, token = connected(path, Timer())
        with connection:
            assert token is None

"""Reads and writes what goes over a worker's socket: a length, and so many bytes.

A call is two frames, a JSON text and a payload, and so is its answer. A frame is its length as
eight bytes, little-endian, and its bytes. Nothing is allocated on a length's word alone: memory
grows with what has come.

Standard library alone, for the program that calls a worker imports nothing else.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_TEXT = 2**20
"""Bytes that the JSON text of a call or answer may have."""
MOST_PAYLOAD = 2**36
"""Bytes that a payload may have; what it holds has narrower limits of its own."""

_CHUNK = 2**20  # bytes


class FrameError(Exception):
    """Bytes that are no frame, or a connection that ended within one."""


@dataclass(frozen=True)
class Timer:
    """How long may still be waited.

    Args:
        until: on the clock of `time.monotonic`.
    """

    until: float = math.inf

    @staticmethod
    def of(seconds: float | None) -> Timer:
        """A timer that ends after so many seconds; None: never."""
        return Timer() if seconds is None else Timer(time.monotonic() + seconds)

    def set(self, connection: socket.socket) -> None:
        """Let the connection's next operation wait no longer than that.

        Raises:
            TimeoutError: the time is over.
        """
        left = self.left()
        if left is not None and left <= 0:
            raise TimeoutError
        connection.settimeout(left)

    def left(self) -> float | None:
        """Seconds until the end, or 0 after it; None: there is none."""
        return None if math.isinf(self.until) else max(0.0, self.until - time.monotonic())


def send(connection: socket.socket, text: Mapping[str, Any], payload: bytes, timer: Timer) -> None:
    """Send a JSON frame and a payload frame.

    Raises:
        OSError: the connection is gone, or (TimeoutError) the time is over.
    """
    encoded = json.dumps(text).encode()
    timer.set(connection)
    connection.sendall(
        len(encoded).to_bytes(8, "little") + encoded + len(payload).to_bytes(8, "little")
    )
    if payload:
        timer.set(connection)
        connection.sendall(payload)


def receive(
    connection: socket.socket, timer: Timer, most: int = MOST_PAYLOAD
) -> tuple[dict[str, Any], bytes]:
    """The next JSON frame and its payload.

    Args:
        connection: to read from.
        timer: how long to wait.
        most: bytes that the payload may have.

    Raises:
        FrameError: it is no such frame, is longer than is allowed, or was cut short.
        OSError: the connection is gone, or (TimeoutError) the time is over.
    """
    text = receive_text(connection, timer)
    return text, receive_payload(connection, timer, most)


def receive_text(connection: socket.socket, timer: Timer) -> dict[str, Any]:
    """The next JSON frame alone; `receive` says what is raised."""
    try:
        text = json.loads(_frame(connection, timer, MOST_TEXT))
    except (ValueError, RecursionError):
        raise FrameError("its text is not JSON") from None
    if not isinstance(text, dict):
        raise FrameError("its text holds no named values")
    return text


def receive_payload(connection: socket.socket, timer: Timer, most: int = MOST_PAYLOAD) -> bytes:
    """The payload that follows a JSON frame; `receive` says what is raised."""
    return _frame(connection, timer, most)


def _frame(connection: socket.socket, timer: Timer, most: int) -> bytes:
    """The bytes of one frame."""
    length = int.from_bytes(_exactly(connection, 8, timer), "little")
    if length > most:
        raise FrameError(f"a frame of {length} bytes, where at most {most} are taken")
    return bytes(_exactly(connection, length, timer))


def _exactly(connection: socket.socket, length: int, timer: Timer) -> bytearray:
    """So many bytes of the connection."""
    data = bytearray()
    while len(data) < length:
        timer.set(connection)
        part = connection.recv(min(_CHUNK, length - len(data)))
        if not part:
            raise FrameError("the connection ended before all bytes had come")
        data += part
    return data


# --- where a worker is found ---


@dataclass(frozen=True)
class Door:
    """A loopback port, where a worker has no Unix socket, and what opens it.

    Args:
        port: on 127.0.0.1.
        token: which a call has to show. Only who may read the file that it stands in can call.
    """

    port: int
    token: str


def read_door(address: str) -> Door | None:
    """The port and token in the file at an address; None: there is a socket, or nothing.

    Raises:
        FrameError: there is a file of another kind.
        OSError: it cannot be read.
    """
    path = Path(address)
    if not path.is_file():
        return None
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        said = json.loads(path.read_bytes()[:MOST_TEXT])
        port, token = said["port"], said["token"]
        if isinstance(port, int) and isinstance(token, str) and 0 < port < 2**16:
            return Door(port, token)
    raise FrameError("it is a file that no worker has written")


def connected(address: str, timer: Timer) -> tuple[socket.socket, str | None]:
    """A connection to the worker at an address, and the token that it wants.

    Raises:
        FrameError: at the address lies a file of another kind.
        OSError: nobody is there, or (TimeoutError) the time is over.
    """
    door = read_door(address)
    if door is None:
        connection = socket.socket(socket.AF_UNIX)
    else:
        connection = socket.socket(socket.AF_INET)
    try:
        timer.set(connection)
        connection.connect(address if door is None else ("127.0.0.1", door.port))
    except BaseException:
        connection.close()
        raise
    return connection, door.token if door else None

"""Sends messages back to where they came from: workers that stand for those of sites."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedlora.engines.site_listener import Listener


class Echo:
    """A worker that sends back what it gets, and is never at anything."""

    def __init__(self, name: str) -> None:
        self.name = name

    def handle(self, message: bytes, seconds: float | None) -> bytes:
        """The message."""
        return message

    def status(self) -> dict[str, Any]:
        """Its name."""
        return {"site": self.name}

    def cancel(self) -> None:
        """Nothing is under way."""

    def stop(self) -> None:
        """It ends with the benchmark."""


@contextmanager
def echoes(directory: Path, number: int) -> Iterator[dict[str, str]]:
    """Echoes behind sockets: name -> path, `directory/site-K.sock`."""
    with ExitStack() as stack:
        addresses = {}
        for name in (f"site-{k}" for k in range(number)):
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            addresses[name] = str(directory / f"{name}.sock")
            listening.bind(addresses[name])
            listening.listen()
            Listener(listening, Echo(name), token=None).start()
        yield addresses

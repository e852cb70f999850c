"""Brings messages to sites by their names, and their answers as they come.

A `Transport` carries bytes and knows nothing of what they say. `SocketTransport` calls workers on
this machine; another one may hand the bytes to a federation's own network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from fedlora.engines import carrier
from fedlora.engines.carrier import SiteError

Answer = bytes | SiteError
"""What a site has answered, or why nothing came of it."""

_GRACE = 1.0  # seconds after a deadline in which a site may say itself that it has passed


class Transport(Protocol):
    """Reaches sites by their names."""

    def names(self) -> Sequence[str]:
        """The sites that there are, be they up or not, in the order of their names."""

    def send(
        self, messages: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Answer]]:
        """Send every site its message, and bring the answers in the order in which they come.

        Args:
            messages: site -> what it is sent.
            deadline: a moment of `time.monotonic()` after which nobody is waited for; None: as long
                as it takes.

        Returns:
            An iterator of one answer, or `SiteError`, for every site.
        """

    def cancel(self, names: Sequence[str]) -> None:
        """Tell sites to stop what they train; returns when they have been told."""

    def status(self, name: str) -> Mapping[str, Any]:
        """What a site is at, as `fedlora worker --status` tells; empty where it cannot be told."""

    def close(self) -> None:
        """Let go of all connections."""


class SocketTransport:
    """Calls the workers of sites on their sockets (`fedlora.engines.carrier`), a thread for each.

    Args:
        addresses: site -> path of its worker's socket.
    """

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self.addresses = dict(addresses)

    def names(self) -> Sequence[str]:
        """The sites in the order of their names."""
        return sorted(self.addresses)

    def send(
        self, messages: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Answer]]:
        """Call all workers at a time; see `Transport.send`."""
        answers = SimpleQueue[tuple[str, Answer]]()

        def call(name: str, message: bytes) -> None:
            answers.put((name, self._call(name, message, deadline)))

        for name, message in messages.items():
            # A worker that hangs must not keep this process from ending.
            threading.Thread(
                target=call, args=(name, message), name=f"site-{name}", daemon=True
            ).start()
        missing = set(messages)
        while missing:
            wait = None if deadline is None else max(0.0, deadline + _GRACE - time.monotonic())
            try:
                name, answer = answers.get(timeout=wait)
            except Empty:
                break
            missing.discard(name)
            yield name, answer
        for name in sorted(missing):
            yield name, SiteError("deadline", "it did not answer by the deadline")

    def _call(self, name: str, message: bytes, deadline: float | None) -> Answer:
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            return carrier.call(self.addresses[name], message, seconds=seconds)
        except SiteError as error:
            return error

    def cancel(self, names: Sequence[str]) -> None:
        """Cancel at all workers at a time; see `Transport.cancel`."""

        def cancel(name: str) -> None:
            with suppress(SiteError):  # it is gone, and trains no more
                carrier.cancel(self.addresses[name])

        threads = [threading.Thread(target=cancel, args=(name,), daemon=True) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:  # told late, it would stop what it is asked next
            thread.join()

    def status(self, name: str) -> Mapping[str, Any]:
        """What the worker is at; empty where it does not answer."""
        try:
            return carrier.status(self.addresses[name])
        except SiteError:
            return {}

    def close(self) -> None:
        """Every call is a connection of its own; none is left."""

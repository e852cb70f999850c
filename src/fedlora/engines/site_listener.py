"""Takes calls from a worker's socket, each in a thread of its own, and answers them.

Standard library alone: it listens, and tells its status, before torch is imported.
"""

from __future__ import annotations

import hmac
import json
import socket
import threading
from contextlib import closing, suppress
from typing import Any, Protocol

from fedlora.engines.carrier import SiteError
from fedlora.engines.frames import FrameError, Timer, receive_payload, receive_text, send

MOST_CALLS = 32
"""Calls that are open at a time; further ones wait to be taken."""

_PATIENCE = 30.0  # seconds for a call to be said
_TRANSFER = 600.0  # seconds for a payload on its way


class Worker(Protocol):
    """What answers calls."""

    def handle(self, message: bytes, seconds: float | None) -> bytes:
        """The answer to a message; raises SiteError."""

    def status(self) -> dict[str, Any]:
        """What it is at."""

    def cancel(self) -> None:
        """Give up what it is at."""

    def stop(self) -> None:
        """End, once this call is answered."""


class Listener:
    """Answers a socket's calls until the process ends.

    Args:
        server: the socket, which listens already.
        worker: answers.
        token: that every call has to show; None: who can open the socket may call.
    """

    def __init__(self, server: socket.socket, worker: Worker, token: str | None) -> None:
        self.server, self.worker, self.token = server, worker, token
        self._free = threading.Semaphore(MOST_CALLS)

    def start(self) -> None:
        """Take calls from now on."""
        threading.Thread(target=self._accept, name="calls", daemon=True).start()

    def finish(self, seconds: float) -> None:
        """Wait until every call is answered, but no longer than that."""
        timer = Timer.of(seconds)
        for _ in range(MOST_CALLS - 1):  # the last one is for the next call, which nobody takes
            if not self._free.acquire(timeout=timer.left()):
                return

    def _accept(self) -> None:
        while True:
            self._free.acquire()
            try:
                connection, _ = self.server.accept()
            except OSError:
                return  # the socket is closed
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Answer the one call of a connection; one that breaks off is nobody's any more."""
        try:
            with closing(connection), suppress(OSError, FrameError):
                self._answer(connection)
        finally:
            self._free.release()

    def _answer(self, connection: socket.socket) -> None:
        text = receive_text(connection, Timer.of(_PATIENCE))
        answer: dict[str, Any] = {"ok": True}
        result = b""
        try:
            self._check(text)
            message = receive_payload(connection, Timer.of(_TRANSFER))
            result = self._result(text, message)
        except SiteError as error:
            answer = {"ok": False, "kind": error.kind, "reason": error.reason}
        send(connection, answer, result, Timer.of(_TRANSFER))
        if answer["ok"] and text["call"] == "stop":
            self.worker.stop()

    def _check(self, text: dict[str, Any]) -> None:
        """Refuse who does not show the token, and what is no call, before any payload is read."""
        token, seconds = text.get("token"), text.get("seconds")
        if self.token is not None and not (
            isinstance(token, str) and hmac.compare_digest(token.encode(), self.token.encode())
        ):
            raise SiteError("refused", "the token is not the worker's; call it by its own file")
        if text.get("call") not in ("message", "status", "cancel", "stop"):
            raise SiteError(
                "mistake", "this worker knows no such call; install one version on both sides"
            )
        if seconds is not None and (
            isinstance(seconds, bool) or not isinstance(seconds, int | float)
        ):
            raise SiteError("mistake", "seconds: expected a number")

    def _result(self, text: dict[str, Any], message: bytes) -> bytes:
        name = text["call"]
        if name == "message":
            return self.worker.handle(message, text.get("seconds"))
        if name == "status":
            return json.dumps(self.worker.status()).encode()
        if name == "cancel":
            self.worker.cancel()
        return b""

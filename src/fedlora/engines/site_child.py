"""Holds torch, the base and the rows of a site in the process that a worker supervises.

    python -m fedlora.engines.site_child SITE.yaml LISTENING LIFELINE RESTARTS

LISTENING is the number of the descriptor of the socket that calls come from, LIFELINE that of a
connection to the supervisor: it ends when the supervisor does, and takes this process with it; and
over it goes, before this process ends, why it cannot begin. Imported at first is the standard
library alone, so that the worker tells its status while torch is loaded.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedlora.engines.carrier import SiteError
from fedlora.engines.frames import read_door
from fedlora.engines.site_listener import Listener
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from fedlora.engines.site_service import SiteService

CANNOT_BEGIN = 2
"""The exit code of a process that would fail in the same way if it was started again."""

_ANSWERING = 5.0  # seconds for answers that are on their way when the process ends

Job = tuple[Callable[[], bytes], "Future[bytes]"]


class Resident:
    """What answers calls, from before torch is imported until the process ends.

    The function that makes an answer runs in the main thread, where torch is: every thread that
    uses it would have a pool of threads of its own.

    Args:
        name: of the site.
        restarts: how often the process was started again.
    """

    def __init__(self, name: str, restarts: int) -> None:
        self.name, self.restarts = name, restarts
        self.since = time.time()
        self.service: SiteService | None = None
        self._ready = threading.Event()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()

    # --- calls, from their threads ---

    def handle(self, message: bytes, seconds: float | None) -> bytes:
        """The answer to a message, once the service is there."""
        began = time.monotonic()
        if not self._ready.wait(seconds):
            raise SiteError("deadline", "the deadline has passed while the worker starts")
        assert self.service is not None
        if seconds is not None:
            seconds -= time.monotonic() - began
        return self.service.handle(message, seconds)

    def status(self) -> dict[str, Any]:
        """What the worker is at."""
        common = {"restarts": self.restarts, "started": self.since}
        if self.service is None:
            starting = {"site": self.name, "pid": os.getpid(), "state": "starting"}
            return {**starting, "since": self.since, **common}
        return {**self.service.status(), **common}

    def cancel(self) -> None:
        """Give up what is worked on."""
        if self.service is not None:
            self.service.cancel()

    def stop(self) -> None:
        """End, after the step that is at work."""
        self.cancel()
        self._jobs.put(None)

    # --- the main thread ---

    def run_in(self, answer: Callable[[], bytes]) -> bytes:
        """Have the main thread make an answer."""
        made: Future[bytes] = Future()
        self._jobs.put((answer, made))
        return made.result()

    def serve(self, service: SiteService) -> None:
        """Make answers until the process is to end."""
        self.service = service
        service.restore()
        self._ready.set()
        while (job := self._jobs.get()) is not None:
            answer, made = job
            try:
                made.set_result(answer())
            except Exception as error:
                made.set_exception(error)


def main(arguments: list[str]) -> int:
    """Serve until told to stop; gives the exit code."""
    path, listening, lifeline_number, restarts = arguments
    lifeline = socket.socket(fileno=int(lifeline_number))
    threading.Thread(target=_end_with_supervisor, args=(lifeline,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _serve(path, socket.socket(fileno=int(listening)), int(restarts))
    except FedloraError as error:
        lifeline.sendall(str(error).encode())
        return CANNOT_BEGIN


def _serve(path: str, server: socket.socket, restarts: int) -> int:
    from fedlora.config.site import read_site

    site = read_site(path)
    door = read_door(site.socket) if site.port is not None else None
    resident = Resident(site.name, restarts)
    listener = Listener(server, resident, door.token if door else None)
    listener.start()
    from fedlora.config.site_run import check_settings
    from fedlora.config.train_function import load_train_function
    from fedlora.engines.site_service import SiteService

    if (name := check_settings(site).train_function) is not None:
        load_train_function(name)  # what cannot be imported is said now, not in the first round
    resident.serve(SiteService(site, run_in=resident.run_in))
    listener.finish(_ANSWERING)
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    """End at once: what is on disk is whole, and whoever waits for an answer is told by the end."""
    os._exit(128 + number)


def _end_with_supervisor(lifeline: socket.socket) -> None:
    """End when the supervisor is gone, however that ended."""
    while lifeline.recv(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The process that holds torch tells its status before the service is there, and then serves."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from fedlora.engines import carrier, site_child
from fedlora.engines.carrier import SiteError
from fedlora.engines.site_child import CANNOT_BEGIN, Resident, main
from fedlora.engines.site_service import SiteService


class Service:
    """In the service's place: answers in the main thread, and says in which."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.cancelled = 0

    def restore(self) -> None:
        pass

    def handle(self, message: bytes, seconds: float | None) -> bytes:
        def answer() -> bytes:
            if message == b"no":
                raise ValueError("no")
            return threading.current_thread().name.encode()

        return self.resident.run_in(answer)

    def status(self) -> dict[str, Any]:
        return {"state": "idle"}

    def cancel(self) -> None:
        self.cancelled += 1


def in_thread(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_before_the_service_is_there() -> None:
    resident = Resident("clinic", 2)
    status = resident.status()
    assert (status["site"], status["state"], status["restarts"]) == ("clinic", "starting", 2)
    resident.cancel()
    with pytest.raises(SiteError, match="while the worker starts"):
        resident.handle(b"", 0.01)


def test_answers_are_made_in_the_thread_that_serves() -> None:
    resident = Resident("clinic", 0)
    service = Service(resident)
    said: list[bytes | str] = []

    def ask() -> None:
        said.append(resident.handle(b"yes", None))
        with pytest.raises(ValueError, match="no"):
            resident.handle(b"no", 5)
        said.append(resident.status()["state"])
        resident.stop()

    asking = in_thread(ask)
    resident.serve(cast(SiteService, service))
    asking.join(5)
    assert said == [threading.current_thread().name.encode(), "idle"]
    assert service.cancelled == 1


def test_what_cannot_begin_says_why_to_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Impossible values are found where torch is, and would be found again after a restart."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(site_child, "_end_with_supervisor", lambda lifeline: None)
    path = tmp_path / "site.yaml"
    path.write_text("name: x\ntrain_file: rows.jsonl\nclient_eval_fraction: 2\n")
    ours, theirs = socket.socketpair()
    with ours, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        code = main([str(path), str(server.detach()), str(theirs.detach()), "0"])
        assert carrier.status(str(tmp_path / "s"))["state"] == "starting"
        said = ours.recv(4096).decode()
        assert code == CANNOT_BEGIN
        assert said == "client_eval_fraction: 2 must be less than 1"

"""The process that holds torch tells its status before the service is there, and then serves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from fedlora.engines.carrier import SiteError
from fedlora.engines.site_child import Resident
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

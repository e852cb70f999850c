"""Many sites are asked at a time, and answer as they come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from fedlora.engines import at_once as module
from fedlora.engines.at_once import LATE, at_once
from fedlora.engines.carrier import SiteError
from fedlora.engines.site_calls import LeftError


def raising(error: Exception) -> Callable[[], int]:
    def ask() -> int:
        raise error

    return ask


def test_outcomes_come_as_they_come_and_mistakes_are_outcomes() -> None:
    others, looks = threading.Event(), list[int]()
    asks = {
        0: lambda: others.wait(30) and 7,
        1: raising(SiteError("refused", "no")),
        2: raising(LeftError("done")),
        3: raising(ZeroDivisionError("no steps")),
    }
    came = {}
    for client, outcome in at_once(asks, None, lambda: looks.append(1)):
        came[client] = outcome
        if len(came) == 3:
            assert 0 not in came
            others.set()
    assert came[0] == 7
    assert isinstance(came[2], LeftError)
    reasons = [x.reason for x in (came[1], came[3]) if isinstance(x, SiteError)]
    assert reasons == ["no", "ZeroDivisionError: no steps"]
    assert len(looks) >= 4


def test_nobody_is_waited_for_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.0)
    done = threading.Event()
    ((client, outcome),) = at_once({5: lambda: done.wait(30)}, time.monotonic(), lambda: None)
    done.set()
    assert client == 5
    assert isinstance(outcome, SiteError)
    assert (outcome.kind, outcome.reason) == ("deadline", LATE)

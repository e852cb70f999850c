"""Asks many sites at a time, a thread for each, and brings what comes of it as it comes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from queue import Empty, SimpleQueue
from typing import TypeVar

from fedlora.engines.carrier import SiteError
from fedlora.engines.site_calls import LeftError

T = TypeVar("T")

LATE = "it was not done by the round's deadline"

_GRACE = 2.0  # seconds after a deadline in which a site's own answer is waited for
_LOOK = 1.0  # seconds after which `meanwhile` is called, though nobody has answered


def at_once(
    asks: Mapping[int, Callable[[], T]], deadline: float | None, meanwhile: Callable[[], None]
) -> Iterator[tuple[int, T | SiteError | LeftError]]:
    """Ask all of them; whatever goes wrong with one of them is what comes of it.

    Args:
        asks: client number -> asks its site, and gives what it has answered.
        deadline: a moment of `time.monotonic()` after which nobody is waited for; None: as long as
            it takes.
        meanwhile: called in this thread about once a second, and before every outcome.
    """
    outcomes: SimpleQueue[tuple[int, T | SiteError | LeftError]] = SimpleQueue()

    def put(client: int, ask: Callable[[], T]) -> None:
        try:
            outcomes.put((client, ask()))
        except (SiteError, LeftError) as error:
            outcomes.put((client, error))
        except Exception as error:
            outcomes.put((client, SiteError("failed", f"{type(error).__name__}: {error}")))

    for client, ask in asks.items():
        # A site that hangs must not keep this process from ending.
        name = f"client-{client}"
        threading.Thread(target=put, args=(client, ask), name=name, daemon=True).start()
    missing = set(asks)
    while missing and (left := _seconds_until(deadline)) > 0:
        try:
            client, outcome = outcomes.get(timeout=min(_LOOK, left))
        except Empty:
            continue
        finally:
            meanwhile()
        missing.discard(client)
        yield client, outcome
    for client in sorted(missing):
        yield client, SiteError("deadline", LATE)


def _seconds_until(deadline: float | None) -> float:
    """How long an answer may still be waited for."""
    return math.inf if deadline is None else max(0.0, deadline + _GRACE - time.monotonic())

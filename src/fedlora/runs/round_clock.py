"""Measures where the seconds of a round go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from fedlora.runs.events import Seconds

Part = Literal["train", "aggregate", "evaluate"]


class RoundClock:
    """Counts every second of a round for the part of it that is going on.

    A round goes through its parts in turn (`now`); while clients train, single updates are taken by
    the server and single models are evaluated in between (`meanwhile`).

    Args:
        part: what goes on first.
        read: gives the seconds of a clock that never goes back.
    """

    def __init__(self, part: Part, read: Callable[[], float] = time.perf_counter) -> None:
        self._part, self._read = part, read
        self._since = read()
        self._seconds = Seconds(train=0.0, aggregate=0.0, evaluate=0.0)

    def now(self, part: Part) -> None:
        """From now on this part of the round goes on."""
        moment = self._read()
        self._seconds[self._part] += moment - self._since
        self._part, self._since = part, moment

    @contextmanager
    def meanwhile(self, part: Part) -> Iterator[None]:
        """This part goes on for a while; then the one before goes on."""
        before = self._part
        self.now(part)
        try:
            yield
        finally:
            self.now(before)

    def seconds(self) -> Seconds:
        """What was counted until now."""
        self.now(self._part)
        return self._seconds.copy()

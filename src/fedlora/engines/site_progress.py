"""Looks how far the training at sites is, while their answers are waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal

from fedlora.runs.events import Step

Status = Callable[[str], Mapping[str, Any]]
"""What a site is at, as its worker tells it; empty where it cannot be told."""


class StepWatch:
    """Asks sites again and again what they are at, in a thread of its own.

    Args:
        status: of a site.
        clients: site -> its number, of those that train.
        round: that they train in.
        seconds: between two looks.
    """

    def __init__(
        self, status: Status, clients: Mapping[str, int], round: int, seconds: float = 1.0
    ) -> None:
        self.status, self.clients, self.round, self.seconds = status, clients, round, seconds
        self._steps: SimpleQueue[Step] = SimpleQueue()
        self._last: dict[int, int] = {}
        self._over = threading.Event()

    def __enter__(self) -> StepWatch:
        threading.Thread(target=self._watch, name="site-steps", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        self._over.set()
        return False

    def steps(self) -> list[Step]:
        """The steps that were seen since this was asked last; some are missed, and none is told
        twice. Nobody tells here how many tokens they had."""
        steps = []
        while True:
            try:
                steps.append(self._steps.get_nowait())
            except Empty:
                return steps

    def _watch(self) -> None:
        while not self._over.wait(self.seconds):
            for name, client in self.clients.items():
                self._look(client, self.status(name))

    def _look(self, client: int, status: Mapping[str, Any]) -> None:
        step, steps, loss = (status.get(key) for key in ("step", "steps", "loss"))
        if status.get("round") != self.round or not isinstance(step, int):
            return
        if not isinstance(steps, int) or step <= self._last.get(client, 0):
            return
        self._last[client] = step
        loss = float(loss) if isinstance(loss, int | float) else float("nan")
        self._steps.put(
            Step(event="step", client=client, step=step, steps=steps, loss=loss, tokens=0)
        )

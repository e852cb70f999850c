"""How far the training at sites is."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from fedlora.engines.site_progress import StepWatch


def test_steps_are_told_once_and_those_of_other_rounds_are_not() -> None:
    looks = {
        "a": [{"round": 2, "step": 1, "steps": 3, "loss": 0.5}] * 2
        + [{"round": 2, "step": 3, "steps": 3, "loss": None}],
        "b": [{}, {"round": 1, "step": 1, "steps": 3, "loss": 0.5}, {"round": 2, "step": None}],
    }
    seen = threading.Event()

    def status(name: str) -> Mapping[str, Any]:
        if not looks[name]:
            seen.set()
            return {}
        return looks[name].pop(0)

    with StepWatch(status, {"a": 0, "b": 1}, 2, seconds=0.001) as watch:
        assert seen.wait(30)
    first, second = watch.steps()
    assert first == {
        "event": "step", "client": 0, "step": 1, "steps": 3, "loss": 0.5, "tokens": 0,
    }  # fmt: skip
    assert (second["step"], second["loss"] != second["loss"]) == (3, True)
    assert watch.steps() == []

"""Pretends a machine of two cores whose others are busy, and runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fedlora
from fedlora import threads
from fedlora.threads import Reading


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Machine:
    """A machine of two cores whose clocks are made up: `others` are busy, we are too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: float, ours: float = 2.0) -> None:
        self.others, self.ours, self.read = others, ours, 0
        self.clock = Reading(0.0, 0.0, 0.0)
        monkeypatch.setattr(threads, "reading", self.reading)
        monkeypatch.setattr(threads, "cores", lambda: 2.0)
        monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)

    def reading(self) -> Reading:
        """One second later at each reading."""
        self.read += 1
        was = self.clock
        self.clock = Reading(was.time + 1, was.busy + self.others + self.ours, was.own + self.ours)
        return self.clock


def run(
    keys: dict[str, Any], wanted: int = 2, **options: Any
) -> tuple[fedlora.Result, list[str], list[str]]:
    told, choices = list[str](), list[str]()

    def report(event: Any) -> None:
        if event["event"] == "warning":
            told.append(event["message"])
        if event["event"] == "begin":
            choices.extend(event["choices"])

    config = None if "resume" in options else fedlora.Config(**keys)
    torch.set_num_threads(wanted)
    return fedlora.run(config, report=report, **options), told, choices


@pytest.fixture
def keys(small_run: dict[str, Any]) -> dict[str, Any]:
    """Four rounds of one client and one step, without an evaluation; the number of threads is open.

    Two threads on cores that others use too are many times slower than one, so little is computed.
    """
    return {
        **small_run,
        "num_threads": None,
        "num_rounds": 4,
        "max_steps": 1,
        "clients_per_round": 1,
        "lora_target_modules": ["q_proj"],
        "eval_file": None,
        "dtype": "float32",
        "use_cpu": True,
    }

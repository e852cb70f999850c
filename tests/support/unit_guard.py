"""Finds out a unit test that starts a run or a process."""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

RUNS = ("run", "run_session")
"""Functions of `fedlora.engines.local` that every run goes through."""

_PROCESSES: tuple[tuple[Any, str], ...] = (
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    (os, "fork"),
    (os, "forkpty"),
    (os, "posix_spawn"),
    (os, "posix_spawnp"),
    (os, "system"),
)
"""Where Python starts a process."""

_offences: list[str] | None = None
"""What the unit test that runs has done; None while there is none."""


def _offend(what: str) -> None:
    assert _offences is not None
    _offences.append(what)
    raise AssertionError(what)


def _no_run(*arguments: Any, **named: Any) -> None:
    _offend("a unit test starts no run; it belongs into tests/runs")


def _no_process(start: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of a function that starts a process."""

    def refuse(*arguments: Any, **named: Any) -> Any:
        if _importing():
            return start(*arguments, **named)
        return _offend("a unit test starts no process; it belongs into tests/system")

    return refuse


def _importing() -> bool:
    """Whether a module is being imported: some libraries ask the system about itself then, in
    whichever test is the first to need them."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
    return False


@pytest.fixture(autouse=True)
def only_a_unit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse runs and processes, also where the code under test catches the refusal."""
    global _offences

    import fedlora.engines.local

    for name in RUNS:
        monkeypatch.setattr(fedlora.engines.local, name, _no_run)
    for owner, name in _PROCESSES:
        monkeypatch.setattr(owner, name, _no_process(getattr(owner, name)))
    _offences = []
    yield
    done, _offences = _offences, None
    if done:
        pytest.fail(done[0], pytrace=False)

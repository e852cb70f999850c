"""A run beside processes that are really busy."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedlora.threads import reading
from support.threads import (
    keys,  # noqa: F401
    run,
    two_threads,  # noqa: F401
)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_beside_processes_that_are_really_busy(keys: dict[str, Any]) -> None:
    """One for every core, so that none is free whatever else runs here."""
    count = len(os.sched_getaffinity(0))
    loop = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(loop) for _ in range(count)]
    try:
        time.sleep(0.5)
        _, _, choices = run({**keys, "num_rounds": 1}, max(2, count))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert [x for x in choices if "instead of" in x and "other processes keep" in x]


def compute() -> None:
    while True:
        pass


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_what_a_live_worker_computes_is_the_runs_own() -> None:
    """Or a run would find its own workers in its way."""
    before = reading()
    child = multiprocessing.get_context("fork").Process(target=compute, daemon=True)
    child.start()
    try:
        deadline, spent = time.monotonic() + 60, 0.0
        while spent < 0.5 and time.monotonic() < deadline:
            time.sleep(0.05)  # it takes next to nothing of this process
            now = reading()
            assert before is not None
            assert now is not None
            spent = now.own - before.own
    finally:
        child.kill()
        child.join()
    assert spent >= 0.5

"""Marks every test with the tier of its folder, and tells of the slow ones that were left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
TIERS = ("unit", "runs", "system")
"""Folders of tests, and the markers their tests get."""

_LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test with its tier, before `-m` chooses among them."""
    for item in items:
        for folder in item.path.relative_to(config.rootpath).parts:
            if folder in TIERS:
                item.add_marker(folder)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the slow tests that `-m "not slow"` leaves out."""
    if items and "not slow" in (items[0].config.option.markexpr or ""):
        slow = sum(item.get_closest_marker("slow") is not None for item in items)
        items[0].config.stash[_LEFT_OUT] = items[0].config.stash.get(_LEFT_OUT, 0) + slow


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Each of several processes collects all tests, and tells the first what it left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Hear it from a process that ends (pytest-xdist)."""
    told = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[_LEFT_OUT] = max(told, node.config.stash.get(_LEFT_OUT, 0))


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of all says what was not run."""
    number = config.stash.get(_LEFT_OUT, 0)
    if number and not hasattr(config, "workerinput"):
        tests = "1 slow test was" if number == 1 else f"{number} slow tests were"
        print(f"{tests} left out; make test-slow runs {'it' if number == 1 else 'them'}")

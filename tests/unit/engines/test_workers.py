"""The pool is an engine; its processes are tested in tests/system/test_workers.py."""

from __future__ import annotations

import inspect

from fedlora.engines.workers import WorkersEngine
from fedlora.runs.engine import Engine


def test_it_is_an_engine() -> None:
    for name, wanted in vars(Engine).items():
        if not name.startswith("_"):
            own = inspect.getattr_static(WorkersEngine, name)
            assert isinstance(own, property) is isinstance(wanted, property)

"""Reads docs/methods.md, and loads the module it shows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from support.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "methods.md").read_text()


def from_file(name: str, path: Path) -> Any:
    """A module from a file outside the package."""
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module

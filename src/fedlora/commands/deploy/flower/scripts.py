"""Fills in the files that start a participant: scripts, and the settings of nginx."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_FILES = Path(__file__).with_name("files")


def filled_in(name: str, values: Mapping[str, str | int] | None = None) -> str:
    """A file of the folder `files`, with values in the place of `@NAME@`.

    Args:
        name: of the file.
        values: by name, in capitals; all that the file asks for.
    """
    text = (_FILES / name).read_text(encoding="utf-8")
    for key, value in (values or {}).items():
        text = text.replace(f"@{key}@", str(value))
    assert not re.search(r"@[A-Z]+@", text), f"{name} has a place that no value was given for"
    return text

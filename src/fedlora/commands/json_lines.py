"""Writes JSON for programs: one object a line on standard output, and nothing else there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from fedlora.text import finite

Emit = Callable[[Mapping[str, Any]], None]
"""Writes an object as a line of JSON."""


@contextmanager
def only_json() -> Iterator[Emit]:
    """Standard output for JSON alone, as long as this lasts.

    Whatever else is printed, by us, a library or a model's own code, goes to standard error. The
    file descriptor is turned away too, for output that does not come from Python.
    """
    out = lines = sys.stdout
    out.flush()
    kept = os.dup(1)
    try:
        is_ours = out.fileno() == 1
    except (AttributeError, OSError, ValueError):  # a stream of a test or a notebook
        is_ours = False
    if is_ours:
        lines = open(os.dup(kept), "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(2, 1)

    def emit(value: Mapping[str, Any]) -> None:
        print(json.dumps(finite(value), allow_nan=False, default=str), file=lines, flush=True)

    try:
        with redirect_stdout(sys.stderr):
            yield emit
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        if is_ours:
            lines.close()

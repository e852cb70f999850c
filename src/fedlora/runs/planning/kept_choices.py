"""Keeps how a machine trains fastest, so that a second run need not measure again.

One small JSON file in the package's cache directory for each question: machine, versions, shape of
the model, and what was open. A file that cannot be read or written is no error.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlora import __version__, threads
from fedlora.data.cache_directory import cache_directory
from fedlora.runs.planning.fastest_way import Way

VERSION = 1
"""Raised when steps are measured, or ways are chosen, in another manner."""


def question(asked: Mapping[str, Any]) -> str:
    """The name of the file that answers a question.

    Args:
        asked: all that the answer depends on beside machine and versions; plain values.
    """
    of_machine = [platform.machine(), _processor(), threads.cores()]
    versions = [version(name) for name in ("torch", "transformers")] + [__version__]
    text = json.dumps([VERSION, of_machine, versions, asked], sort_keys=True)
    return f"fastest-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _processor() -> str:
    """The processor's name, and whether it computes in bfloat16."""
    lines = Path("/proc/cpuinfo")
    with suppress(OSError):
        told = [x for x in lines.read_text().splitlines() if x.startswith(("model name", "flags"))]
        named = {x.partition(":")[0].strip(): x.partition(":")[2].split() for x in told}
        bf16 = [flag for flag in named.get("flags", ()) if "bf16" in flag]
        return " ".join([*named.get("model name", ()), *bf16])
    return platform.processor()


def read(name: str) -> tuple[Way, str] | None:
    """The way that was found and what was said of it; None: there is no file, or it is damaged."""
    directory = cache_directory()
    if directory is None:
        return None
    try:
        kept = json.loads((directory / name).read_text(encoding="utf-8"))
        way, words = Way(**kept["way"]), kept["words"]
        numbers = way.threads, way.workers, way.clients
        if not all(type(x) is int and x >= 0 for x in numbers) or not way.threads * way.clients:
            return None
        return (way, words) if isinstance(words, str) and isinstance(way.dtype, str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(name: str, way: Way, words: str) -> None:
    """Keep an answer, where that is possible."""
    directory = cache_directory()
    if directory is None:
        return
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=directory)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"way": asdict(way), "words": words}, file)
        os.replace(temporary, directory / name)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)

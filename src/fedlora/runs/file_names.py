"""Names the files of a run's directory, for those that write it and those that only read it.

Also reads the one line of them that is no YAML: what the user wrote of keys that the run settled.
"""

from __future__ import annotations

import json
import re
from typing import Any

CONFIG, METRICS, FINAL, MANIFEST = "config.yaml", "metrics.jsonl", "final", "manifest.json"
LOCK, PARTIAL_CONFIG = ".lock", f".{CONFIG}.partial"
ROUND = re.compile(r"round-(\d+)")
"""What the directory of a saved round is called, in full."""
AS_WRITTEN = "# Settled by the run itself; as it was written: "
"""Before the keys, as JSON, in the last line of `config.yaml`."""


def as_written(text: str) -> dict[str, Any]:
    """The keys that a run settled by itself, as the user wrote them; none where none are told.

    Args:
        text: of `config.yaml`.
    """
    last = text.rstrip().rpartition("\n")[2]
    if not last.startswith(AS_WRITTEN):
        return {}
    try:
        keys = json.loads(last.removeprefix(AS_WRITTEN))
    except (ValueError, RecursionError):
        return {}
    return keys if isinstance(keys, dict) else {}

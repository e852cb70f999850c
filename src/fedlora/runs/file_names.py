"""Names the files of a run's directory, for those that write it and those that only read it."""

from __future__ import annotations

import re

CONFIG, METRICS, FINAL, MANIFEST = "config.yaml", "metrics.jsonl", "final", "manifest.json"
LOCK, PARTIAL_CONFIG = ".lock", f".{CONFIG}.partial"
ROUND = re.compile(r"round-(\d+)")
"""What the directory of a saved round is called, in full."""
AS_WRITTEN = "# Settled by the run itself; as it was written: "
"""Before the keys, as JSON, in the last line of `config.yaml`."""

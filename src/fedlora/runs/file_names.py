"""Names the files of a run's directory, for those that write it and those that only read it."""

from __future__ import annotations

CONFIG, METRICS, FINAL, MANIFEST = "config.yaml", "metrics.jsonl", "final", "manifest.json"
LOCK, PARTIAL_CONFIG = ".lock", f".{CONFIG}.partial"
AS_WRITTEN = "# Settled by the run itself; as it was written: "
"""Before the keys, as JSON, in the last line of `config.yaml`."""

"""Reads `metrics.jsonl`, with the standard library alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlora.runs.file_names import METRICS


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; of a round that was run again, only the last.

    A resumed run logs `{"event": "resume", "round": N}`; what stands before it about later rounds
    no longer counts. Of several models and measures (`eval`), the last of each is kept.
    """
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for text in (Path(path) / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the half-written last line of a killed run
        if line["event"] == "resume":
            out = {key: x for key, x in out.items() if key[1] <= line["round"]}
        else:
            out[line["event"], line["round"], line.get("name"), line.get("model")] = line
    return list(out.values())

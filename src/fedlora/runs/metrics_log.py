"""Reads and writes `metrics.jsonl`, with the standard library alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.runs.file_names import METRICS


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; of a round that was run again, only the last.

    A resumed run logs `{"event": "resume", "round": N}`; what stands before it about later rounds
    no longer counts. Of several models and measures (`eval`), the last of each is kept.
    """
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for text in (Path(path) / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the half-written last line of a killed run
        if line["event"] == "resume":
            lines = {key: x for key, x in lines.items() if key[1] <= line["round"]}
        else:
            lines[line["event"], line["round"], line.get("name"), line.get("model")] = line
    return list(lines.values())


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append one line to a log and force it to the disk."""
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
        log.flush()
        os.fsync(log.fileno())


def cut_off_half_a_line(path: Path) -> None:
    """Remove the last line of a log where a killed run has written half of it."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as log:
            log.truncate(content.rfind(b"\n") + 1)

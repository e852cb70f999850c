"""Writes what a run leaves while it goes on, and renders the view of it."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from fedlora.commands.look import Look, Reader
from fedlora.commands.watch.view import view
from fedlora.runs.progress import PROGRESS

Line = dict[str, Any]


def a_round(number: int, count: int = 3, **more: Any) -> Line:
    return {
        "event": "round",
        "round": number,
        "clients": [
            {
                "client": k,
                "rank": 8 - k % 8,
                "num_examples": 10,
                "weight": 0.3,
                "bytes_down": 1000,
                "bytes_up": 500,
                "metrics": {"loss": 3.0 / number + k, "steps": 20, "tokens": 100},
                "rejected": "a NaN" if k == 2 else "",
            }
            for k in range(count)
        ],
        "bytes_up": 500 * count,
        "bytes_down": 1000 * count,
        "evaluation": {"loss": 4.0 / number, "exact_match": 0.1 * number},
        "seconds": {"train": 8.0, "aggregate": 1.0, "evaluate": 1.0},
        **more,
    }


START: Line = {"event": "start", "round": 0, "evaluation": {"loss": 8.0, "exact_match": 0.0}}


def written(
    path: Path,
    lines: list[Line],
    count: int = 3,
    progress: dict[str, Any] | None = None,
    ended: bool = False,
) -> Path:
    """A run's directory."""
    path.mkdir()
    config = {
        "method": "exact",
        "model_name_or_path": "embedded",
        "num_rounds": 4,
        "client_ranks": [8 - k % 8 for k in range(count)],
        "metric_for_best_model": "eval_exact_match",
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / ".lock").touch()
    if lines:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / "metrics.jsonl").write_text(text)
    if progress is not None:
        (path / PROGRESS).write_text(json.dumps(progress))
    if ended:
        (path / "final").mkdir()
    return path


def snapshot(count: int = 3, training: int = 2, **more: Any) -> dict[str, Any]:
    """Of a run of this process, in its third round."""
    now = time.time()
    states = {
        k: {"rank": 8 - k % 8, "state": "training", "step": 5, "steps": 20, "loss": 1.5}
        for k in range(count - training, count)
    }
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": now - 100,
        "updated": now,
        "phase": "training",
        "problem": None,
        "round": 3,
        "num_rounds": 4,
        "finished": 2,
        "round_began": now - 4,
        "seconds_per_round": 12.0,
        "share": 0.25,
        "tokens_per_second": 3456.0,
        "counts": {
            "selected": count,
            "waiting": 0,
            "training": training,
            "done": count - training,
            "rejected": 0,
            "late": 0,
            "unneeded": 0,
        },
        "clients": states,
        "losses": [[x / 10, 4.0 - x / 10] for x in range(1, 22)],
        "warnings": ["client 2 is left out of round 2: a NaN"],
        **more,
    }


def look_at(path: Path) -> Look:
    found = Reader(path).look()
    assert found is not None
    return found


def shown(look: Look, width: int = 80, height: int = 24) -> list[str]:
    """The view as it stands in a terminal of that size."""
    console = Console(file=io.StringIO(), width=width, _environ={})
    console.print(view(look, width, height))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= height
    return [line.rstrip() for line in lines]

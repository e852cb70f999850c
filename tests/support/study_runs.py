"""Writes by hand the runs that a small study is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlora.commands.study.plan import Part, Planned, Study

PART = Part("table", "two rules", {"ranks": ("equal", "mixed"), "method": ("exact", "flora")},
            "method", "exact", "exact_match")  # fmt: skip
LOSSES = {("equal", "exact"): 0.5, ("equal", "flora"): 0.25, ("mixed", "exact"): 0.75}


def finished_run(
    path: Path, value: float | None, errors: tuple[float | None, ...] = (0.5, None)
) -> None:
    """A complete run of two rounds of two clients."""
    (path / "final").mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"event": "begin", "round": 0, "parameters": 100, "clients": [{}, {}]},
        {"event": "start", "round": 0, "evaluation": {"exact_match": 0.9}},
    ]
    for number, error in enumerate(errors, 1):
        lines.append(
            {
                "event": "round", "round": number, "clients": [{}, {}], "bytes_up": 10,
                "bytes_down": 30, "aggregation_error": error,
                "seconds": {"train": 2.0, "aggregate": 1.0, "evaluate": 9.0},
                "evaluation": {"exact_match": value},
            }
        )  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def study_with_runs(path: Path) -> tuple[Study, Path]:
    """Three of four cells, two seeds; flora's run of mixed ranks is not there."""
    planned = []
    for ranks in ("equal", "mixed"):
        for method in ("exact", "flora"):
            for seed in (0, 1):
                labels = {"ranks": ranks, "method": method}
                name = f"{ranks}-{method}-{seed}"
                planned.append(Planned("table", labels, seed, {}, called=name))
                if (ranks, method) in LOSSES:
                    finished_run(path / name, LOSSES[ranks, method] + 0.1 * seed)
    return Study("mine", "small", "which?", (PART,), tuple(planned)), path

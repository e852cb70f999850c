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
    path: Path,
    value: float | None,
    errors: tuple[float | None, ...] = (0.5, None),
    held_out: tuple[float, float] | None = None,
) -> None:
    """A complete run of two rounds of two clients, which hold out 3 and 1 rows.

    Args:
        path: its directory.
        value: exact match at the end.
        errors: aggregation error by round.
        held_out: exact match at the end on what each client holds out; None: they hold out none.
    """
    (path / "final").mkdir(parents=True)
    clients = [{"client": k, "eval_rows": rows} for k, rows in enumerate((3, 1))]
    of_clients = {str(k): {"exact_match": x} for k, x in enumerate(held_out or ())}
    lines: list[dict[str, Any]] = [
        {"event": "begin", "round": 0, "parameters": 100, "clients": clients},
        {"event": "start", "round": 0, "evaluation": {"exact_match": 0.9}},
    ]
    for number, error in enumerate(errors, 1):
        lines.append(
            {
                "event": "round", "round": number, "clients": [{}, {}], "bytes_up": 10,
                "bytes_down": 30, "aggregation_error": error,
                "seconds": {"train": 2.0, "aggregate": 1.0, "evaluate": 9.0},
                "evaluation": {"exact_match": value},
                **({"client_evaluations": of_clients} if of_clients else {}),
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


def study_of_rates(path: Path) -> tuple[Study, Path]:
    """Two rules at two learning rates; exact is better at the first on held-out rows, flora at the
    second, and on the common rows it is the other way round."""
    part = Part(
        "table", "two rules", {"rate": ("low", "high"), "method": ("exact", "flora")},
        "method", "exact", "exact_match", choose="rate",
    )  # fmt: skip
    held_out = {("low", "exact"): 0.6, ("high", "exact"): 0.5, ("low", "flora"): 0.1,
                ("high", "flora"): 0.2}  # fmt: skip
    planned = []
    for (rate, method), value in held_out.items():
        for seed in (0, 1):
            name = f"{rate}-{method}-{seed}"
            labels = {"rate": rate, "method": method}
            planned.append(Planned("table", labels, seed, {}, called=name))
            finished_run(path / name, 0.9 - value, held_out=(value, value))
    return Study("mine", "small", "which?", (part,), tuple(planned)), path

"""Writes a study's runs and tables as CSV, for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.commands.study.outcomes import Outcome, outcome
from fedlora.commands.study.plan import Study
from fedlora.commands.study.statistics import mean_and_sd
from fedlora.commands.study.tables import Table


def runs_csv(study: Study, runs: Path) -> str:
    """A line per run and part: its outcome, or why it has none."""
    axes = list(dict.fromkeys(axis for part in study.parts for axis in part.axes))
    metrics = {part.name: part.metric for part in study.parts}
    head = ["part", *axes, "seed", "metric", "value", "best", "aggregation_error"]
    head += ["bytes_up", "bytes_down", "seconds", "directory", "missing"]
    rows: list[list[Any]] = []
    for run in study.runs:
        result = outcome(runs / run.directory, metrics[run.part])
        row: list[Any] = [run.part, *(run.labels.get(axis, "") for axis in axes), run.seed]
        row.append(metrics[run.part])
        if isinstance(result, Outcome):
            row += [result.value, result.best, result.error, result.up, result.down]
            row += [round(result.seconds, 3), run.directory, ""]
        else:
            row += ["", "", "", "", "", "", run.directory, result]
        rows.append(row)
    return _csv(head, rows)


def summary_csv(all_tables: Sequence[Table]) -> str:
    """A line per row of a table, with its interval."""
    head = ["part", "cell", "label", "metric", "seeds", "mean", "sd", "reference"]
    head += ["difference", "low", "high", "verdict", "chosen"]
    rows: list[list[Any]] = []
    for table in all_tables:
        for row in table.rows:
            mean, sd = mean_and_sd(row.values)
            part, difference = table.part, row.difference
            start = [part.name, ", ".join(row.cell), row.label, part.metric, len(row.values)]
            end: list[Any] = ["", "", "", ""]
            if difference:
                verdict = difference.verdict(table.greater)
                end = [difference.mean, difference.low, difference.high, verdict]
            rows.append([*start, mean, sd, part.reference, *end, row.chosen])
    return _csv(head, rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()

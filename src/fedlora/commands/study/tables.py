"""Makes a study's tables from its runs: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.commands.study.plan import Part, Planned, Study
from fedlora.commands.study.statistics import Difference, mean_and_sd, paired
from fedlora.runs.file_names import FINAL
from fedlora.runs.metrics_log import read_metrics

LESS_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class Outcome:
    """What a complete run came to.

    Args:
        value: the metric at the end.
        best: its best value over all evaluated rounds.
        error: mean aggregation error of a round; None where it has none.
        up, down: bytes of the whole run.
        seconds: of all rounds, evaluation aside.
        traffic: bytes up and down over those of full fine-tuning with the same participation, every
            parameter as float32 both ways; None where the run does not say how many there are.
        with_base: the same with the download of the base to every client counted.
    """

    value: float
    best: float
    error: float | None
    up: int
    down: int
    seconds: float
    traffic: float | None = None
    with_base: float | None = None


def outcome(path: Path, metric: str) -> Outcome | str:
    """A run's outcome, or why there is none.

    Args:
        path: its directory.
        metric: a key of its evaluations.
    """
    if not (path / FINAL).is_dir():
        return "not complete"
    lines = read_metrics(path)
    evaluations = [x["evaluation"] for x in lines if x.get("evaluation") and x["event"] != "eval"]
    if not evaluations or metric not in evaluations[-1]:
        known = (
            ", ".join(k for k, x in evaluations[-1].items() if isinstance(x, float))
            if evaluations
            else ""
        )
        return f"measures no {metric}" + (f" (there are {known})" if known else "")
    values = [x[metric] for x in evaluations if x.get(metric) is not None]
    if evaluations[-1][metric] is None:
        return f"ended with a {metric} that is no number"
    rounds = [line for line in lines if line["event"] == "round"]
    errors = [x["aggregation_error"] for x in rounds if x["aggregation_error"] is not None]
    up, down = sum(x["bytes_up"] for x in rounds), sum(x["bytes_down"] for x in rounds)
    begin = next((x for x in lines if x["event"] == "begin"), None)
    traffic = with_base = None
    if begin and begin.get("parameters"):
        base = 4 * begin["parameters"]
        full = 2 * base * sum(len(x["clients"]) for x in rounds)
        traffic = (up + down) / full
        with_base = (up + down + base * len(begin["clients"])) / full
    return Outcome(
        value=evaluations[-1][metric],
        best=min(values) if metric in LESS_IS_BETTER else max(values),
        error=sum(errors) / len(errors) if errors else None,
        up=up,
        down=down,
        seconds=sum(x["seconds"]["train"] + x["seconds"]["aggregate"] for x in rounds),
        traffic=traffic,
        with_base=with_base,
    )


@dataclass(frozen=True)
class Row:
    """One value of the compared axis in one cell, over seeds.

    Args:
        cell: the values of the other axes.
        label: the value of the compared axis.
        outcomes: seed -> outcome.
        difference: to the reference; None for the reference itself or without common seeds.
    """

    cell: tuple[str, ...]
    label: str
    outcomes: Mapping[int, Outcome]
    difference: Difference | None

    @property
    def values(self) -> list[float]:
        """The metric, by seed."""
        return [self.outcomes[seed].value for seed in sorted(self.outcomes)]


@dataclass(frozen=True)
class Table:
    """A part with its outcomes.

    Args:
        part: of the study.
        rows: cell by cell.
        missing: run -> why it is not in the table.
    """

    part: Part
    rows: tuple[Row, ...]
    missing: Mapping[str, str]

    @property
    def greater(self) -> bool:
        """Whether more of the metric is better."""
        return self.part.metric not in LESS_IS_BETTER

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """All cells, in order."""
        return list(dict.fromkeys(row.cell for row in self.rows))


def tables(study: Study, runs: Path) -> list[Table]:
    """All parts' tables from what is in the directory of runs."""
    return [
        _table(part, [r for r in study.runs if r.part == part.name], runs) for part in study.parts
    ]


def _table(part: Part, planned: Sequence[Planned], runs: Path) -> Table:
    """A part's outcomes by cell and label, over seeds, with differences to the reference."""
    by_cell: dict[tuple[tuple[str, ...], str], dict[int, Outcome]] = {}
    missing: dict[str, str] = {}
    others = [axis for axis in part.axes if axis != part.compare]
    for run in planned:
        cell = tuple(run.labels[axis] for axis in others)
        here = by_cell.setdefault((cell, run.labels[part.compare]), {})
        result = outcome(runs / run.directory, part.metric)
        if isinstance(result, Outcome):
            if run.alone is not None:  # nothing is sent to nobody
                result = replace(result, up=0, down=0, error=None, traffic=None, with_base=None)
            here[run.seed] = result
        else:
            at = ", ".join([*run.labels.values(), f"seed {run.seed}"])
            missing[at] = result
    rows = []
    for cell in itertools.product(*(part.axes[axis] for axis in others)):
        base = _values(by_cell.get((cell, part.reference), {}))
        for label in part.axes[part.compare]:
            outcomes = by_cell.get((cell, label), {})
            against = None
            if outcomes and base and label != part.reference:
                against = paired(_values(outcomes), base)
            if outcomes:
                rows.append(Row(cell, label, outcomes, against))
    return Table(part, tuple(rows), missing)


def _values(outcomes: Mapping[int, Outcome]) -> dict[int, float]:
    return {seed: x.value for seed, x in outcomes.items()}


def over_cells(table: Table, label: str) -> tuple[Difference, int] | None:
    """The difference to the reference of a seed's mean over the cells that both have, and how many
    these are."""
    rows = {(row.cell, row.label): row for row in table.rows}
    pairs = [
        (rows[cell, label], rows[cell, table.part.reference])
        for cell in table.cells
        if (cell, label) in rows and (cell, table.part.reference) in rows
    ]
    if not pairs:
        return None
    seeds = set.intersection(*(a.outcomes.keys() & b.outcomes.keys() for a, b in pairs))
    mean_a = {s: sum(a.outcomes[s].value for a, _ in pairs) / len(pairs) for s in seeds}
    mean_b = {s: sum(b.outcomes[s].value for _, b in pairs) / len(pairs) for s in seeds}
    difference = paired(mean_a, mean_b)
    return (difference, len(pairs)) if difference else None


# --- Markdown ---


def scale_of(metric: str) -> tuple[float, str]:
    """Shares are shown in %."""
    return (1.0, "") if metric in LESS_IS_BETTER else (100.0, "%")


def markdown(study: Study, all_tables: Sequence[Table], about: str = "") -> str:
    """The study's page."""
    seeds = sorted({run.seed for run in study.runs})
    lines = [f"# {study.name} ({study.size})", ""]
    if study.question:
        lines += [study.question, ""]
    lines += [
        *([about, ""] if about else []),
        f"Seeds {' '.join(map(str, seeds))}. Values are mean ± standard deviation over seeds at "
        "the end of the run; a difference is the mean of the paired differences with its 95% "
        "interval (Student's t over seeds). *Wins* and *loses* mean that this interval excludes "
        "0; one in twenty does so by chance.",
    ]
    for table in all_tables:
        lines += ["", f"## {table.part.name}: {table.part.title}", "", *_section(table)]
    return "\n".join(lines) + "\n"


def _section(table: Table) -> list[str]:
    """A part as Markdown: all cells side by side, each cell, and what is missing."""
    lines = []
    if len(table.cells) > 1:
        lines += [*_matrix(table), ""]
    for cell in table.cells:
        if cell:
            lines += [f"### {', '.join(cell)}", ""]
        lines += [*_cell(table, cell), ""]
    for why in table.part.left_out:
        lines.append(f"Left out: {why}.")
    if table.missing:
        reasons = dict.fromkeys(table.missing.values())
        count = len(table.missing)
        lines.append(f"{count} {'run is' if count == 1 else 'runs are'} missing:")
        lines += [f"- {run}: {why}" for run, why in list(table.missing.items())[:20]]
        if count > 20:
            lines.append(f"- ... ({'; '.join(reasons)})")
    return lines


def _matrix(table: Table) -> list[str]:
    """All cells side by side, and the verdicts."""
    part, (factor, unit) = table.part, scale_of(table.part.metric)
    rows = {(row.cell, row.label): row for row in table.rows}
    head = [part.compare, *(", ".join(cell) for cell in table.cells)]
    head += [f"over all, to `{part.reference}`", "wins/ties/loses"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for label in part.axes[part.compare]:
        own = [rows.get((cell, label)) for cell in table.cells]
        if not any(own):
            continue
        verdicts = [x.difference.verdict(table.greater) for x in own if x and x.difference]
        counts = "/".join(str(verdicts.count(word)) for word in ("wins", "ties", "loses"))
        overall = over_cells(table, label) if label != part.reference else None
        lines.append(
            _line(
                [
                    f"`{label}`",
                    *(_value(row, factor) if row else "" for row in own),
                    _overall(overall, len(table.cells), factor),
                    counts if label != part.reference else "",
                ]
            )
        )
    lines.append("")
    lines.append(f"{part.metric}{' in ' + unit if unit else ''}.")
    return lines


def _overall(overall: tuple[Difference, int] | None, cells: int, factor: float) -> str:
    if overall is None:
        return ""
    difference, number = overall
    return _difference(difference, factor) + (f" ({number} cells)" if number < cells else "")


def _cell(table: Table, cell: tuple[str, ...]) -> list[str]:
    """One cell as a Markdown table, the best value of the compared axis first."""
    part, (factor, unit) = table.part, scale_of(table.part.metric)
    rows = [row for row in table.rows if row.cell == cell]
    traffic = any(x.traffic is not None for row in rows for x in row.outcomes.values())
    head = [
        part.compare,
        part.metric + (f" ({unit})" if unit else ""),
        "seeds",
        f"difference to `{part.reference}`",
        "",
        "agg. error",
        "MB up",
        "MB down",
        *(["of full fine-tuning", "with the base's download"] if traffic else []),
        "seconds",
    ]
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda r: mean_and_sd(r.values)[0], reverse=table.greater):
        outcomes = list(row.outcomes.values())
        errors = [x.error for x in outcomes if x.error is not None]
        verdict = row.difference.verdict(table.greater) if row.difference else ""
        cells = [
            f"`{row.label}`",
            _value(row, factor),
            str(len(outcomes)),
            _difference(row.difference, factor),
            verdict,
            f"{sum(errors) / len(errors):.1e}" if errors else "-",
            f"{_mean([x.up for x in outcomes]) / 1e6:.1f}",
            f"{_mean([x.down for x in outcomes]) / 1e6:.1f}",
        ]
        if traffic:
            cells += [_share([x.traffic for x in outcomes])]
            cells += [_share([x.with_base for x in outcomes])]
        lines.append(_line([*cells, f"{_mean([x.seconds for x in outcomes]):.0f}"]))
    return lines


def _share(values: Sequence[float | None]) -> str:
    known = [x for x in values if x is not None]
    return f"{_mean(known):.4f}" if known else "-"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _value(row: Row, factor: float) -> str:
    mean, sd = mean_and_sd([factor * x for x in row.values])
    digits = 1 if factor == 100.0 else 4
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _difference(x: Difference | None, factor: float) -> str:
    if x is None:
        return ""
    digits = 1 if factor == 100.0 else 4
    mean = f"{factor * x.mean:+.{digits}f}"
    if x.low is None or x.high is None:
        return mean
    return f"{mean} [{factor * x.low:+.{digits}f}, {factor * x.high:+.{digits}f}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# --- JSON ---


def table_record(table: Table) -> dict[str, Any]:
    """A table as a program reads it; shares are not in %."""
    part, rows = table.part, []
    for row in table.rows:
        mean, sd = mean_and_sd(row.values)
        x = row.difference
        against = {"mean": x.mean, "low": x.low, "high": x.high, "seeds": x.seeds} if x else None
        rows.append(
            {
                "cell": list(row.cell),
                part.compare: row.label,
                "mean": mean,
                "sd": sd,
                "values": {str(seed): row.outcomes[seed].value for seed in sorted(row.outcomes)},
                "difference": against,
                "verdict": x.verdict(table.greater) if x else None,
            }
        )
    return {
        "part": part.name,
        "title": part.title,
        "metric": part.metric,
        "compare": part.compare,
        "reference": part.reference,
        "rows": rows,
        "missing": dict(table.missing),
    }


# --- CSV ---


def runs_csv(study: Study, runs: Path) -> str:
    """A line per run and part."""
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
    head += ["difference", "low", "high", "verdict"]
    rows: list[list[Any]] = []
    for table in all_tables:
        for row in table.rows:
            mean, sd = mean_and_sd(row.values)
            part, x = table.part, row.difference
            start = [part.name, ", ".join(row.cell), row.label, part.metric, len(row.values)]
            end = [x.mean, x.low, x.high, x.verdict(table.greater)] if x else ["", "", "", ""]
            rows.append([*start, mean, sd, part.reference, *end])
    return _csv(head, rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()

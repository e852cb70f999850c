"""Writes a study's tables as a page of Markdown, for people."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.commands.study.outcomes import LESS_IS_BETTER
from fedlora.commands.study.plan import Part, Study
from fedlora.commands.study.statistics import Difference, mean_and_sd
from fedlora.commands.study.tables import Row, Table, over_cells


def scale_of(metric: str) -> tuple[float, str]:
    """What a metric is multiplied by to be shown, and its unit: shares are shown in %."""
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
        of_label = [rows.get((cell, label)) for cell in table.cells]
        if not any(of_label):
            continue
        verdicts = [x.difference.verdict(table.greater) for x in of_label if x and x.difference]
        counts = "/".join(str(verdicts.count(word)) for word in ("wins", "ties", "loses"))
        overall = over_cells(table, label) if label != part.reference else None
        lines.append(
            _line(
                [
                    f"`{label}`",
                    *(_value(row, factor) if row else "" for row in of_label),
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
    has_traffic = any(x.traffic is not None for row in rows for x in row.outcomes.values())
    head = [
        part.compare,
        *([f"{part.choose}, best on validation rows"] if part.choose else []),
        part.metric + (f" ({unit})" if unit else ""),
        "seeds",
        f"difference to `{part.reference}`",
        "",
        "agg. error",
        "MB up",
        "MB down",
        *(["of full fine-tuning", "with the base's download"] if has_traffic else []),
        "seconds",
    ]
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda r: mean_and_sd(r.values)[0], reverse=table.greater):
        outcomes = list(row.outcomes.values())
        errors = [x.error for x in outcomes if x.error is not None]
        verdict = row.difference.verdict(table.greater) if row.difference else ""
        cells = [
            f"`{row.label}`",
            *([_chosen(part, row.chosen)] if part.choose else []),
            _value(row, factor),
            str(len(outcomes)),
            _difference(row.difference, factor),
            verdict,
            f"{sum(errors) / len(errors):.1e}" if errors else "-",
            f"{_mean([x.up for x in outcomes]) / 1e6:.1f}",
            f"{_mean([x.down for x in outcomes]) / 1e6:.1f}",
        ]
        if has_traffic:
            cells += [_share([x.traffic for x in outcomes])]
            cells += [_share([x.with_base for x in outcomes])]
        lines.append(_line([*cells, f"{_mean([x.seconds for x in outcomes]):.0f}"]))
    return lines


def _chosen(part: Part, value: str) -> str:
    """The value that was chosen; at an end of the range a better one may lie beyond it."""
    values = part.axes[part.choose]
    return value + (" (an end of the range)" if value in (values[0], values[-1]) else "")


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

"""Lists what can be measured of a model, and how each measure is drawn by round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.commands.report.series import Curve, Series, curve
from fedlora.commands.run_files import Line, Run, mapping, number

MEASURES = {
    "exact_match": ("Exact match", True, True),
    "accuracy": ("Accuracy", True, True),
    "macro_f1": ("Macro F1", True, True),
    "token_accuracy": ("Token accuracy", True, True),
    "loss": ("Loss", False, False),
    "perplexity": ("Perplexity", False, False),
}
"""Title, whether it is a share, whether more is better; the first that is there leads."""

KINDS = {
    "evaluation": ("global model", "the global model on the common held-out rows"),
    "client_evaluations": (
        "global, on clients' rows",
        "the global model on each client's own held-out rows, mean over clients",
    ),
    "personal_evaluations": (
        "clients' own models",
        "the model each client ended its round with, mean over clients",
    ),
    "general_evaluation": (
        "general text",
        "the model on general text it was not trained on: what it forgets (the mean of the "
        "clients' models where there is no global one)",
    ),
}
"""Keys of a line, what a line of the plot is called, and what it means."""


@dataclass(frozen=True)
class PanelLine:
    """One line of a plot: its label, its values, and a mark that stays with the label."""

    label: str
    curve: Curve


@dataclass(frozen=True)
class Panel:
    """One plot of quality by round.

    Args:
        kind: a key of `KINDS`.
        measure: a key of an evaluation.
        title: of the plot.
        note: what was measured on what.
        percent: a share, shown in percent.
        greater: more is better; None: unknown.
        lines: a series each, or with a single series what was measured on what.
        log: it is first drawn on a log scale, because the first round dwarfs the others.
    """

    kind: str
    measure: str
    title: str
    note: str
    percent: bool
    greater: bool | None
    lines: tuple[PanelLine, ...]
    log: bool = False


DWARFS = 20
"""A first value of more than so many times the median of the later ones hides what they do."""


def titled(line: Line, kind: str) -> dict[str, float]:
    """The numbers of one evaluation; over several clients, the mean of those that have one."""
    scores = mapping(line.get(kind))
    if kind not in ("client_evaluations", "personal_evaluations"):
        return {k: x for k, value in scores.items() if (x := number(value)) is not None}
    by_measure: dict[str, list[float]] = {}
    for own in scores.values():
        for key, value in mapping(own).items():
            if (x := number(value)) is not None:
                by_measure.setdefault(key, []).append(x)
    return {key: statistics.fmean(values) for key, values in by_measure.items()}


def by_round(run: Run, kind: str) -> dict[str, dict[int, float]]:
    """Measure -> round -> value."""
    out: dict[str, dict[int, float]] = {}
    for line in (run.start, *run.rounds):
        for measure, value in titled(line, kind).items() if line else ():
            out.setdefault(measure, {})[int(line["round"])] = value
    return out


def panels(runs: Sequence[Run], series: Sequence[Series]) -> list[Panel]:
    """The plots of quality, the leading measure first."""
    by_kind = {kind: [by_round(run, kind) for run in runs] for kind in KINDS}
    named = dict.fromkeys(m for by in by_kind.values() for run in by for m in run)
    measures = sorted(named, key=lambda m: [*MEASURES, m].index(m))

    def lines(kind: str, measure: str) -> list[PanelLine]:
        out = []
        for one in series:
            own = [x[measure] for i in one.runs if measure in (x := by_kind[kind][i])]
            if own:
                label = one.label if len(series) > 1 else KINDS[kind][0]
                out.append(PanelLine(label, curve(own)))
        return out

    out = []
    if len(series) > 1:
        for kind in KINDS:
            for measure in measures:
                if drawn := lines(kind, measure):
                    out.append(_panel(kind, measure, drawn))
        return out
    together = [kind for kind in KINDS if kind != "general_evaluation"]
    for measure in measures:
        drawn = [x for kind in together for x in lines(kind, measure)]
        if drawn:
            kinds = [k for k in together if lines(k, measure)]
            out.append(_panel(kinds[0], measure, drawn, [KINDS[k][1] for k in kinds]))
    for measure in measures:
        if drawn := lines("general_evaluation", measure):
            out.append(_panel("general_evaluation", measure, drawn))
    return out


def _panel(kind: str, measure: str, lines: Sequence[PanelLine], notes: Sequence[str] = ()) -> Panel:
    title, percent, greater = MEASURES.get(measure, (measure.replace("_", " "), False, None))
    where = {
        "evaluation": "",
        "client_evaluations": " on clients' rows",
        "personal_evaluations": " of clients' own models",
        "general_evaluation": " on general text",
    }[kind]
    note = "; ".join(notes or [KINDS[kind][1]])
    positive = all(y > 0 for x in lines for y in x.curve.mean)
    log = not percent and positive and any(_dwarfed(x.curve.mean) for x in lines)
    return Panel(kind, measure, title + where, note, percent, greater, tuple(lines), log)


def _dwarfed(values: Sequence[float]) -> bool:
    """Whether the first value leaves no room on a plot for the others."""
    return len(values) > 1 and values[0] > DWARFS * statistics.median(values[1:])


def change(run: Run, clients: Sequence[int]) -> Iterable[dict[str, Any]]:
    """For every measure of clients' own rows: before training, and in the last round that has it.

    Yields:
        `measure`, `title`, `percent`, `greater`, and lists with an entry per client: `before`,
        `after` (the global model), `personal` (the client's own), with the rounds they are of.
    """
    before = mapping(run.start.get("client_evaluations"))
    after_round, after = _newest(run, "client_evaluations")
    own_round, own = _newest(run, "personal_evaluations")
    named = dict.fromkeys(
        key for part in (before, after, own) for x in part.values() for key in mapping(x)
    )

    def values(part: dict[str, Any], measure: str) -> list[float | None]:
        return [number(mapping(part.get(str(client))).get(measure)) for client in clients]

    for measure in sorted(named, key=lambda m: [*MEASURES, m].index(m)):
        columns = [values(part, measure) for part in (before, after, own)]
        if any(x is not None for column in columns for x in column):
            title, percent, greater = MEASURES.get(
                measure, (measure.replace("_", " "), False, None)
            )
            yield {
                "measure": measure,
                "title": title,
                "percent": percent,
                "greater": greater,
                "before": columns[0],
                "after": columns[1],
                "personal": columns[2],
                "after_round": after_round,
                "personal_round": own_round,
            }


def _newest(run: Run, kind: str) -> tuple[int | None, dict[str, Any]]:
    for line in reversed(run.rounds):
        if scores := mapping(line.get(kind)):
            return int(line["round"]), scores
    return None, {}

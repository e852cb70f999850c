"""Compares the runs of a study: cell by cell, over seeds, with paired differences."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.commands.study.outcomes import LESS_IS_BETTER, Outcome, outcome
from fedlora.commands.study.plan import Part, Planned, Study
from fedlora.commands.study.statistics import Difference, mean_and_sd, paired


@dataclass(frozen=True)
class Row:
    """One value of the compared axis in one cell, over seeds.

    Args:
        cell: the values of the other axes.
        label: the value of the compared axis.
        outcomes: seed -> outcome.
        difference: to the reference; None for the reference itself or without common seeds.
        chosen: the value of the part's chosen axis; "" where it has none.
    """

    cell: tuple[str, ...]
    label: str
    outcomes: Mapping[int, Outcome]
    difference: Difference | None
    chosen: str = ""

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


_Found = dict[tuple[tuple[str, ...], str], dict[str, dict[int, Outcome]]]
"""Cell and label -> value of the chosen axis ("" without one) -> seed -> outcome."""


def _table(part: Part, planned: Sequence[Planned], runs: Path) -> Table:
    """A part's outcomes by cell and label, over seeds, with differences to the reference."""
    found, missing = _found(part, planned, runs)
    best = {key: _best(by_value, part.metric) for key, by_value in found.items()}
    rows = []
    for cell in itertools.product(*(part.axes[axis] for axis in part.of_cell)):
        _, of_reference = best.get((cell, part.reference), ("", {}))
        for label in part.axes[part.compare]:
            chosen, by_seed = best.get((cell, label), ("", {}))
            difference = None
            if label != part.reference:
                difference = paired(_values(by_seed), _values(of_reference))
            if by_seed:
                rows.append(Row(cell, label, by_seed, difference, chosen))
    return Table(part, tuple(rows), missing)


def _found(part: Part, planned: Sequence[Planned], runs: Path) -> tuple[_Found, dict[str, str]]:
    """The outcomes of a part's runs, and why others have none."""
    found: _Found = {}
    missing: dict[str, str] = {}
    for run in planned:
        result = outcome(runs / run.directory, part.metric)
        if isinstance(result, Outcome) and part.choose and result.validation is None:
            result = f"measures no {part.metric} on rows that clients hold out"
        if isinstance(result, str):
            missing[", ".join([*run.labels.values(), f"seed {run.seed}"])] = result
            continue
        if run.alone is not None:  # a client that trains by itself sends nothing
            result = replace(result, up=0, down=0, error=None, traffic=None, with_base=None)
        cell = tuple(run.labels[axis] for axis in part.of_cell)
        by_value = found.setdefault((cell, run.labels[part.compare]), {})
        by_value.setdefault(run.labels.get(part.choose, ""), {})[run.seed] = result
    return found, missing


def _best(
    by_value: Mapping[str, Mapping[int, Outcome]], metric: str
) -> tuple[str, Mapping[int, Outcome]]:
    """The value of the chosen axis that is best on validation rows, and its outcomes by seed.

    Values that lack a seed which another has are left out: their means are of other seeds.
    """
    if len(by_value) == 1:
        return next(iter(by_value.items()))
    most = max(len(by_seed) for by_seed in by_value.values())
    sign = -1.0 if metric in LESS_IS_BETTER else 1.0

    def quality(value: str) -> float:
        found = [x.validation for x in by_value[value].values() if x.validation is not None]
        return sign * sum(found) / len(found)

    chosen = max((x for x, by_seed in by_value.items() if len(by_seed) == most), key=quality)
    return chosen, by_value[chosen]


def _values(outcomes: Mapping[int, Outcome]) -> dict[int, float]:
    """Seed -> the metric."""
    return {seed: result.value for seed, result in outcomes.items()}


def over_cells(table: Table, label: str) -> tuple[Difference, int] | None:
    """How a label differs from the reference over all cells that have both.

    A seed's value is the mean over these cells; the differences of seeds are paired.

    Returns:
        The difference, and the number of cells; None where no cell or no seed has both.
    """
    rows = {(row.cell, row.label): row for row in table.rows}
    pairs = [
        (rows[cell, label], rows[cell, table.part.reference])
        for cell in table.cells
        if (cell, label) in rows and (cell, table.part.reference) in rows
    ]
    if not pairs:
        return None
    seeds = set.intersection(*(a.outcomes.keys() & b.outcomes.keys() for a, b in pairs))
    of_label = {s: sum(a.outcomes[s].value for a, _ in pairs) / len(pairs) for s in seeds}
    of_reference = {s: sum(b.outcomes[s].value for _, b in pairs) / len(pairs) for s in seeds}
    difference = paired(of_label, of_reference)
    return (difference, len(pairs)) if difference else None


def table_record(table: Table) -> dict[str, Any]:
    """A table as a program reads it; shares are not in %."""
    part, rows = table.part, []
    for row in table.rows:
        mean, sd = mean_and_sd(row.values)
        difference = row.difference
        rows.append(
            {
                "cell": list(row.cell),
                part.compare: row.label,
                **({"chosen": row.chosen} if part.choose else {}),
                "mean": mean,
                "sd": sd,
                "values": {str(seed): row.outcomes[seed].value for seed in sorted(row.outcomes)},
                "difference": asdict(difference) if difference else None,
                "verdict": difference.verdict(table.greater) if difference else None,
            }
        )
    return {
        "part": part.name,
        "title": part.title,
        "metric": part.metric,
        "compare": part.compare,
        "reference": part.reference,
        **({"choose": part.choose} if part.choose else {}),
        "rows": rows,
        "missing": dict(table.missing),
    }

"""Counts how many rows of each value of a column every client holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from fedlora.config.config import Config
from fedlora.data.raw_data import RawData
from fedlora.data.reading import template_of
from fedlora.data.rows import Rows, columns_of
from fedlora.errors import InputError

MOST_VALUES = 10
"""The number of values that are counted apart; if there are more, the rarest count as one."""


@dataclass(frozen=True)
class LabelCounts:
    """Rows of every client by the values of one column.

    Args:
        column: whose values are counted; None: there is none, and rows are counted.
        values: of the column, the frequent ones first; the last may stand for all others.
        counts: for each client the number of its rows by value.
        names: what each client's rows are called; "" where they have no name.
        evaluation: the global evaluation's number of rows by value; empty where it has none.
    """

    column: str | None
    values: list[str]
    counts: list[list[int]]
    names: list[str]
    evaluation: list[int]

    def of(self, client: int) -> LabelCounts:
        """The counts of one client alone."""
        return replace(self, counts=[self.counts[client]], names=[self.names[client]])


def label_counts(config: Config, raw: RawData, by: str | None = None) -> LabelCounts:
    """Count how many rows of each value every client holds.

    Args:
        config: of the run.
        raw: its rows.
        by: the column to count; None: the one divided by, or a classifier's label.

    Raises:
        InputError: there is no such column.
    """
    column = _counted_column(config, raw, by)

    def count(rows: Rows) -> Counter[str]:
        return Counter(str(row.get(column)) if column else "rows" for row in rows)

    values = [value for value, _ in count(raw.train).most_common()]
    shown = values if len(values) <= MOST_VALUES else values[: MOST_VALUES - 1]
    others = [f"{len(values) - len(shown)} others"] if len(shown) < len(values) else []

    def by_value(rows: Rows) -> list[int]:
        counts = count(rows)
        of_shown = [counts[value] for value in shown]
        return of_shown + [counts.total() - sum(of_shown)] * len(others)

    return LabelCounts(
        column,
        shown + others,
        [by_value(rows) for rows in raw.clients],
        raw.names,
        by_value(raw.eval) if raw.eval else [],
    )


def _counted_column(config: Config, raw: RawData, by: str | None) -> str | None:
    """The column whose values are counted; None: there is none, and rows are counted."""
    columns = columns_of(raw.train)
    if by is None:
        column = config.partition_column or config.label_column_name
        if column is None and config.lora_task_type == "SEQ_CLS":
            column = template_of(config, raw, True).columns[-1][0]
        # The keys may name a column that is not there where nothing is divided by it.
        return column if column in columns else None
    if by not in columns:
        raise InputError(f"{by!r} is not a column; there are {', '.join(columns)}")
    return by

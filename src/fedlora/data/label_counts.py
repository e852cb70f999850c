"""Counts how many rows of each value of a column every client holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora.config.config import Config
from fedlora.data.datasets import RawData, template_of
from fedlora.data.rows import columns_of
from fedlora.errors import InputError

MOST_VALUES = 10
"""Values told apart; the rarest beyond them are counted together."""


@dataclass(frozen=True)
class Holdings:
    """Rows of every client by the values of one column.

    Args:
        column: counted; None: rows alone.
        values: of the column, the frequent ones first; the last may stand for all others.
        counts: by client, by value.
        names: what each client's rows are called; empty texts where they have no names.
        evaluation: by value, of the global evaluation; empty without one.
    """

    column: str | None
    values: list[str]
    counts: list[list[int]]
    names: list[str]
    evaluation: list[int]

    def of(self, client: int) -> Holdings:
        """Those of one client alone."""
        return replace(self, counts=[self.counts[client]], names=[self.names[client]])


def holdings(config: Config, raw: RawData, by: str | None = None) -> Holdings:
    """Count who holds what.

    Args:
        config: of the run.
        raw: its rows.
        by: the column to count; None: the one divided by, or a classifier's label.

    Raises:
        InputError: there is no such column.
    """
    columns = columns_of(raw.train)
    column = by or config.partition_column or config.label_column_name
    if column is None and config.lora_task_type == "SEQ_CLS":
        column = template_of(config, raw, True).columns[-1][0]
    if by is None and column not in columns:
        column = None  # named, and nothing is divided by it
    if column is not None and column not in columns:
        raise InputError(f"{column!r} is not a column; there are {', '.join(columns)}")

    def count(rows: Sequence[Any]) -> Counter[str]:
        return Counter(str(row.get(column)) if column else "rows" for row in rows)

    values = [value for value, _ in count(raw.train).most_common()]
    kept = values if len(values) <= MOST_VALUES else values[: MOST_VALUES - 1]
    other = [f"{len(values) - len(kept)} others"] if len(kept) < len(values) else []

    def row(counts: Counter[str]) -> list[int]:
        own = [counts[value] for value in kept]
        return own + [counts.total() - sum(own)] * len(other)

    return Holdings(
        column,
        kept + other,
        [row(count(rows)) for rows in raw.clients],
        raw.names,
        row(count(raw.eval)) if raw.eval else [],
    )

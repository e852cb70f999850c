"""Divides the rows of one data set among clients by the configuration's `partition`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedlora.data.partition import Indices, by_column, dirichlet, few_labels, iid, quantity
from fedlora.data.rows import Rows, check_column, columns_of, numbered
from fedlora.errors import InputError
from fedlora.seeds import SERVER, Purpose, generator

if TYPE_CHECKING:
    from fedlora.config.config import Config


def divide(config: Config, rows: Rows, num_clients: int | None) -> tuple[list[Indices], list[str]]:
    """Divide one data set among clients as `partition` says.

    Args:
        config: of the run.
        rows: of the data set, without those held out to evaluate on.
        num_clients: how many; None: 10, or with `column` as many as the column has values.

    Returns:
        Each client's row numbers, from 0; and with `column` the value that its rows share, else "".

    Raises:
        InputError: there is no such column, it is empty in a row, or a count does not fit.
    """
    if config.partition == "column":
        column, values = _values_divided_by(rows, config.partition_column, config.label_column_name)
        return _one_value_each(column, values, num_clients, config.partition_min_size)
    rng = generator(config.seed, 0, SERVER, Purpose.PARTITION)
    number = num_clients or 10
    min_size, alpha = config.partition_min_size, config.partition_alpha
    if config.partition in ("dirichlet", "labels"):
        _, values = _values_divided_by(rows, config.partition_column, config.label_column_name)
    if config.partition == "dirichlet":
        parts = dirichlet(values, number, alpha, rng, min_size)
    elif config.partition == "labels":
        parts = few_labels(values, number, config.partition_labels_per_client, rng, min_size)
    elif config.partition == "quantity":
        parts = quantity(len(rows), number, alpha, rng, min_size, config.partition_shares)
    else:
        parts = iid(len(rows), number, rng, min_size)
    return parts, [""] * number


def _values_divided_by(
    rows: Rows, partition_column: str | None, label_column_name: str | None
) -> tuple[str, list[Any]]:
    """The column that rows are divided by, and its value in every row."""
    column = str(partition_column or label_column_name)
    key = "partition_column" if partition_column else "label_column_name"
    if column not in (columns := columns_of(rows)):
        raise InputError(f"{key}: {column!r} is not a column; there are {', '.join(columns)}")
    check_column(numbered(rows), column, "the training data")
    values = [row.get(column) for row in rows]
    if None in values:
        raise InputError(f"{key}: row {values.index(None) + 1} has no {column}")
    return column, values


def _one_value_each(
    column: str, values: list[Any], num_clients: int | None, min_size: int
) -> tuple[list[Indices], list[str]]:
    """A client for each value of a column, with at least so many rows."""
    parts, names = by_column(values)
    if num_clients is not None and num_clients != len(parts):
        raise InputError(
            f"num_clients: {num_clients}, but partition: column makes a client of each of the "
            f"{len(parts)} values of {column}; leave num_clients out"
        )
    too_few = [name for name, part in zip(names, parts, strict=True) if len(part) < min_size]
    if too_few:
        raise InputError(
            f"partition_min_size: {min_size}, but {column} {too_few[0]!r} has fewer rows"
        )
    return parts, names

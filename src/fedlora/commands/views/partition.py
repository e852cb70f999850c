"""Shows who holds what: a table of counts and a bar for each client in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedlora.config.config import Config
from fedlora.data.label_counts import label_counts
from fedlora.data.raw_data import RawData

LETTERS = "abcdefghijklmnopqrstuvwxyz"
COLOURS = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5",
    "#9c6b4e", "#9498a0",
)  # fmt: skip


@dataclass(frozen=True)
class Division:
    """Who holds how many rows of what.

    Args:
        heading: what was divided, and how.
        column: the column that is counted; None: rows alone.
        values: its values, the most frequent first, the last perhaps "other".
        counts: for every client the number of rows of each value.
        names: what the clients are called, or "".
        ranks: their adapter ranks; None: decided when the run begins (`client_ranks: auto`).
        evaluation: rows of the global evaluation of each value.
    """

    heading: str
    column: str | None
    values: list[str]
    counts: list[list[int]]
    names: list[str]
    ranks: Sequence[int | None]
    evaluation: list[int]


def divide(
    config: Config, raw: RawData, ranks: Sequence[int | None], by: str | None = None
) -> Division:
    """Count who holds what.

    Args:
        config: of the run.
        raw: its rows.
        ranks: of the clients; None: not decided yet.
        by: the column to count; None: the one divided by, or a classifier's label.

    Raises:
        InputError: there is no such column.
    """
    counted = label_counts(config, raw, by)
    rows = f"{raw.title}: {len(raw.train):,} rows, {len(raw.clients)} clients"
    return Division(
        f"{rows}, {_how(config, raw)}, seed {config.seed}",
        counted.column,
        counted.values,
        counted.counts,
        counted.names,
        ranks,
        counted.evaluation,
    )


def _how(config: Config, raw: RawData) -> str:
    """How rows were divided, in a few words."""
    how: str = config.partition
    if any(raw.names) and config.partition == "iid":
        how = "one file per client"
    if config.partition in ("dirichlet", "quantity") and config.partition_shares is None:
        how += f" (alpha {config.partition_alpha:g})"
    if config.partition == "labels":
        how += f" ({config.partition_labels_per_client} per client)"
    if config.partition in ("dirichlet", "column", "labels"):
        how += f" by {config.partition_column or config.label_column_name}"
    return how


def brief(value: str) -> str:
    """A value in a heading or legend: on one line, and not too long."""
    value = " ".join(value.split())
    return value if len(value) <= 24 else value[:21] + "..."


def show_partition(division: Division, console: Console) -> None:
    """A table of counts, and a bar per client in the terminal."""
    console.print(Text(division.heading, style="bold"))
    table = _table(division, console.width)
    least = Measurement.get(console, console.options.update(max_width=10_000), table).minimum
    if least > console.width:  # a line that goes on is better than a number cut off
        table.width = least
    console.print(table, crop=False)
    for line in _bars(division, console.width):
        console.print(line, no_wrap=True)
    if division.column is not None:
        console.print(_legend(division))


def _table(division: Division, width: int) -> Table:
    """A row for each client, and one for the evaluation: ranks, rows, and rows of each value."""
    named = any(division.names)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("client", justify="right", no_wrap=True)
    if named:
        table.add_column("holds", overflow="ellipsis", no_wrap=True, max_width=24)
    for heading in ("rank", "rows", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    all_counts = [*division.counts, *([division.evaluation] if division.evaluation else [])]
    for i, heading in enumerate(_headings(division, width)):
        longest = max(len(f"{counts[i]:,}") for counts in all_counts)
        table.add_column(Text(heading), justify="right", overflow="fold", min_width=longest)
    total = sum(map(sum, division.counts))
    for client, counts in enumerate(division.counts):
        name = [Text(division.names[client])] if named else []
        rows = sum(counts)
        table.add_row(
            str(client),
            *name,
            str(division.ranks[client] or "-"),
            f"{rows:,}",
            f"{rows / total:.1%}",
            *_count_cells(division, counts),
        )
    if division.evaluation:
        name = [Text("")] if named else []
        rows = sum(division.evaluation)
        cells = _count_cells(division, division.evaluation)
        table.add_row("eval", *name, "", f"{rows:,}", "", *cells)
    return table


def _headings(division: Division, width: int) -> list[str]:
    """A heading for each value: its letter and its name, or the letter alone where that is wide."""
    if division.column is None:
        return []
    letters = LETTERS[: len(division.values)]
    headings = [f"{x} {brief(value)}" for x, value in zip(letters, division.values, strict=True)]
    least = sum(max(len(word) for word in heading.split()) + 2 for heading in headings)
    return headings if least <= width - 40 else list(letters)  # the legend has the names


def _count_cells(division: Division, counts: Sequence[int]) -> list[str]:
    return [f"{n:,}" if n else "-" for n in counts] if division.column else []


def _bars(division: Division, width: int) -> Iterator[Text]:
    """A bar for each client, as long as its rows are many, in letters and colours of the values."""
    longest = max(20, min(width, 100) - 14)
    most = max(map(sum, division.counts))
    for client, counts in enumerate(division.counts):
        line = Text(f"{client:>6} ")
        for i, size in enumerate(_cells(counts, longest * sum(counts) / most)):
            line.append(LETTERS[i] * size, style=f"black on {COLOURS[i % len(COLOURS)]}")
        line.append(f" {sum(counts):,}")
        yield line


def _legend(division: Division) -> Text:
    legend = Text("\n       ")
    for i, value in enumerate(division.values):
        legend.append(f" {LETTERS[i]} ", style=f"black on {COLOURS[i % len(COLOURS)]}")
        legend.append(f" {brief(value)}  ")
    return legend


def _cells(counts: Sequence[int], width: float) -> list[int]:
    """Characters of a bar of this width for each count; rounded so that they add up to it."""
    total, ends, done = sum(counts), [], 0
    for count in counts:
        done += count
        ends.append(round(width * done / total) if total else 0)
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

"""Runs `fedlora partition`: who holds what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.commands.console import quiet_libraries
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import CONFIGURATION, Option, Syntax, take
from fedlora.config.config import Config
from fedlora.config.sources import settings
from fedlora.embedded import EMBEDDED

if TYPE_CHECKING:
    from fedlora.commands.views.partition import Division

HELP = """\
fedlora partition [CONFIG.yaml] [--key value ...] [--by COLUMN] [--output FILE] [--json]

Shows who holds what: rows and ranks of every client, and how many rows of each value of a column
(the one divided by or a classifier's label, another with --by). FILE is a picture (.png .svg .pdf).

  --partition iid        equal parts at random (Flower: IidPartitioner)
  --partition dirichlet  each value of --partition_column in shares of Dirichlet(--partition_alpha)
                         (DirichletPartitioner)
  --partition column     a client for each value of --partition_column (NaturalIdPartitioner)
  --partition labels     --partition_labels_per_client values each (PathologicalPartitioner)
  --partition quantity   random rows, sizes from Dirichlet(--partition_alpha) or --partition_shares
  --train_file 'site_*'  one file per client, no partition

  --json   one JSON object: column, clients (rank, rows, counts: value -> rows), eval

Examples:
  fedlora partition --train_file all.csv --partition dirichlet --partition_column topic \\
      --partition_alpha 0.1 --num_clients 8 --output who.png
"""
SYNTAX = Syntax(
    {
        "by": Option("the column to count"),
        "output": Option("the picture to write", path="file"),
    },
    CONFIGURATION,
    keys=True,
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora partition`."""
    own = take(arguments, SYNTAX)
    by, output = own["by"], own["output"]
    quiet_libraries()
    from rich.console import Console

    from fedlora.commands.views.partition import divide, show_partition
    from fedlora.commands.views.partition_picture import draw_partition
    from fedlora.commands.views.picture import check_picture
    from fedlora.config.clients import check_overrides, client_ranks
    from fedlora.data.raw_data import load_rows
    from fedlora.runs.absolute_paths import resolve_paths

    picture = check_picture(output) if output else None
    config = resolve_paths(Config(**settings(arguments, EMBEDDED)))
    raw = load_rows(config)
    check_overrides(config, len(raw.clients))
    number = len(raw.clients)
    if config.client_ranks == "auto":  # decided from the model, which is not looked at here
        division = divide(config, raw, [None] * number, by)
    else:
        division = divide(config, raw, client_ranks(config, number), by)
    if picture:
        draw_partition(division, picture)
    if emit:
        emit(_counts(division, picture))
        return 0
    show_partition(division, Console())
    if picture:
        print(f"picture: {picture}")
    return 0


def _counts(division: Division, picture: Path | None) -> dict[str, Any]:
    """Who holds what, as a program reads it."""

    def counted(counts: list[int]) -> dict[str, Any]:
        rows = {"rows": sum(counts)}
        if division.column is None:
            return rows
        return {**rows, "counts": dict(zip(division.values, counts, strict=True))}

    of_each = zip(division.names, division.ranks, division.counts, strict=True)
    evaluation = division.evaluation or [0] * len(division.values)  # there may be none
    return {
        "event": "partition",
        "heading": division.heading,
        "column": division.column,
        "clients": [
            {"client": client, "name": name, "rank": rank, **counted(counts)}
            for client, (name, rank, counts) in enumerate(of_each)
        ],
        "eval": counted(evaluation),
        "picture": picture,
    }

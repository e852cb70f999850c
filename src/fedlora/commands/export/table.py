"""Makes the table of ranks: what each costs in error, bytes and, where rows are there, loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedlora.adapters.aggregate import save_adapter
from fedlora.adapters.export.ranks import RankCost, Spectrum
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.client.evaluate import evaluate
from fedlora.commands.eval.models import Models
from fedlora.commands.export.origin import HeldOut
from fedlora.text import human_bytes


def cut_adapters(
    adapter: SavedAdapter, spectrum: Spectrum, ranks: Sequence[int], where: Path
) -> dict[str, Path]:
    """Write the adapter at every rank of the table, so that PEFT loads it as it would be served.

    Args:
        adapter: in full.
        spectrum: of its update.
        ranks: of the table; the last loses nothing and is not written.
        where: an empty directory.

    Returns:
        `rank-R` -> its PEFT directory.
    """
    paths = {f"rank-{rank}": where / f"rank-{rank}" for rank in ranks[:-1]}
    for rank, path in zip(ranks[:-1], paths.values(), strict=True):
        save_adapter(path, replace(adapter, deltas=spectrum.cut(rank)))
    return paths


def losses(
    models: Models,
    names: Sequence[str],
    rows: HeldOut,
    batch_size: int,
    labels: Sequence[str],
) -> list[float]:
    """The mean loss in nats of each of these models on the rows.

    Args:
        models: that are loaded.
        names: of them, in the order wanted.
        rows: to measure on.
        batch_size: rows at once.
        labels: a classifier's.
    """
    out = []
    for name in names:
        with models.using(name) as model:
            scores = evaluate(
                model, models.tokenizer, rows.rows, batch_size=batch_size, label_names=labels
            )
        out.append(float(scores["loss"]))
    return out


def as_json(costs: Sequence[RankCost], loss: Sequence[float] | None) -> list[dict[str, Any]]:
    """The table as a program reads it."""
    return [
        {**asdict(cost), **({} if loss is None else {"loss": loss[i]})}
        for i, cost in enumerate(costs)
    ]


def _share(energy: float) -> str:
    """`92.43%`; where that would round to all, as many digits as say that it is not."""
    if energy == 1.0:
        return "100%"
    return f"{energy:.2%}" if energy < 0.9999 else f"{energy:.6%}"


def show_table(
    costs: Sequence[RankCost], loss: Sequence[float] | None, chosen: int | None, console: Console
) -> None:
    """A line for each rank.

    Args:
        costs: the last loses nothing.
        loss: of each rank; None: there are no rows.
        chosen: the rank that is written, which is marked.
        console: to print on.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("rank", "rel. error", "energy", "bytes", *(["loss"] if loss else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for i, cost in enumerate(costs):
        cells = [
            str(cost.rank),
            f"{cost.error:.1e}" if cost.error else "0",
            _share(cost.energy),
            human_bytes(cost.nbytes),
        ]
        cells += [f"{loss[i]:.4f}"] if loss else []
        notes = ["full"] * (i == len(costs) - 1) + ["written"] * (cost.rank == chosen)
        table.add_row(*cells, ", ".join(notes))
    console.print(table)

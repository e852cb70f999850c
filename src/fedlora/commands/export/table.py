"""Makes the table of ranks: what each costs in error, bytes and, where rows are there, loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedlora.adapters.aggregate import save_adapter
from fedlora.adapters.export.ranks import RankCost, Spectrum
from fedlora.client.evaluate import evaluate
from fedlora.commands.eval.models import Models
from fedlora.commands.export.origin import HeldOut, Origin
from fedlora.commands.export.readback import load_export
from fedlora.text import human_bytes


def losses(
    models: Models, origin: Origin, spectrum: Spectrum, ranks: Sequence[int], rows: HeldOut
) -> list[float]:
    """The mean loss in nats at each rank of the table.

    At every rank but the last, which loses nothing, the adapter is written and PEFT loads it, as
    it would be served. One of them is held at a time.

    Args:
        models: the base with the origin's adapter on it.
        origin: what is exported.
        spectrum: of its update.
        ranks: of the table.
        rows: to measure on.
    """
    out = []
    for rank in ranks[:-1]:
        with TemporaryDirectory(prefix="fedlora-export-") as scratch:
            path = Path(scratch) / "cut"
            save_adapter(path, replace(origin.adapter, deltas=spectrum.cut(rank)))
            load_export(models, path, "cut")
        out.append(_loss(models, "cut", origin, rows))
        models.peft.set_adapter(origin.model)
        models.peft.delete_adapter("cut")
    return [*out, _loss(models, origin.model, origin, rows)]


def _loss(models: Models, name: str, origin: Origin, rows: HeldOut) -> float:
    """The mean loss of one of the models that are loaded."""
    with models.using(name) as model:
        scores = evaluate(
            model,
            models.tokenizer,
            rows.rows,
            batch_size=rows.batch_size,
            label_names=origin.labels,
        )
    return float(scores["loss"])


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

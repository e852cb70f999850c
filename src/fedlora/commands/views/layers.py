"""Shows what became of every layer when adapters were combined."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.adapters.aggregate import Aggregated
from fedlora.commands.views.sentences import say


def show_layers(result: Aggregated, names: Sequence[str], console: Console) -> None:
    """A line per adapter with its weight, and a table of ranks and errors by layer."""
    for i, (name, weight) in enumerate(zip(names, result.weights, strict=True), 1):
        say(console, f"{i}  weight {weight:.4f}  {name}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("layer", overflow="fold")
    for i in range(1, len(names) + 1):
        table.add_column(f"r {i}", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("rel. error", justify="right", no_wrap=True)
    for name, layer in result.layers.items():
        ranks = ["-" if rank is None else str(rank) for rank in layer.ranks]
        table.add_row(Text(name), *ranks, str(layer.rank), f"{layer.error:.1e}")
    console.print(table)
    if result.dense:
        known = (
            f"their rows are matched by the labels {', '.join(result.labels)}"
            if result.labels
            else "whether their rows stand for the same labels is not written in an adapter"
        )
        say(console, f"saved whole and averaged: {', '.join(result.dense)} ({known})")
    if result.base:
        say(console, f"weights of the base carried along: {', '.join(result.base)}")
    say(console, result.bases)
    for note in result.notes:
        console.print(Text(f"warning: {note}", style="yellow"))

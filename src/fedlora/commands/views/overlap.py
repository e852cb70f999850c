"""Shows how far adapters change the same directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.adapters.overlap import Overlap, Pair
from fedlora.commands.views.sentences import say


def show_overlap(found: Overlap, names: Sequence[str], console: Console) -> None:
    """Tables of the adapters, of every two of them over all layers, and by layer."""
    for i, (name, norm) in enumerate(zip(names, found.norms, strict=True), 1):
        say(console, f"{i}  norm {norm:.4g}  {name}")
    pairs = _table("pair", "cosine", "1st in 2nd", "2nd in 1st", "angle out", "angle in")
    for pair in found.pairs:
        pairs.add_row(_name(pair), *_cells(pair))
    console.print(pairs)
    say(
        console,
        "1st in 2nd: the share of the first's energy within the second's directions; angles are "
        "the means of the principal ones, 90 where nothing is shared",
    )
    layers = _table("layer", *(f"norm {i}" for i in range(1, len(names) + 1)), "shared", "by")
    for name, layer in found.layers.items():
        norms = ["-" if norm is None else f"{norm:.3g}" for norm in layer.norms]
        most = max(layer.pairs, key=mean_shared)
        layers.add_row(Text(name), *norms, f"{mean_shared(most):.1%}", _name(most))
    console.print(layers)
    say(console, "shared: the mean of both shares of the pair that shares the most of the layer")
    say(console, found.bases)
    for note in found.notes:
        console.print(Text(f"warning: {note}", style="yellow"))


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _name(pair: Pair) -> str:
    return f"{pair.first + 1} {pair.second + 1}"


def _cells(pair: Pair) -> list[str]:
    """The numbers of a pair as text; `-` where an update is zero."""
    shares = ["-" if x is None else f"{x:.1%}" for x in pair.shared]
    angles = [f"{x[0]:.1f}" if x else "-" for x in (pair.angles_out, pair.angles_in)]
    return ["-" if pair.cosine is None else f"{pair.cosine:.3f}", *shares, *angles]


def mean_shared(pair: Pair) -> float:
    """The mean of both shares of energy of a pair; one that is not defined counts as 0."""
    return sum(x or 0.0 for x in pair.shared) / 2


def overlap_as_json(found: Overlap, names: Sequence[str]) -> dict[str, Any]:
    """The overlap as a program reads it; adapters are counted from 0 as they were given."""
    return {
        "event": "overlap",
        "adapters": [
            {"path": path, "norm": norm} for path, norm in zip(names, found.norms, strict=True)
        ],
        "pairs": [asdict(pair) for pair in found.pairs],
        "layers": {name: asdict(layer) for name, layer in found.layers.items()},
        "bases": found.bases,
        "notes": list(found.notes),
    }

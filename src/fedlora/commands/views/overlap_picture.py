"""Draws how far adapters change the same directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.adapters.overlap import Overlap
from fedlora.commands.views.overlap import mean_shared
from fedlora.commands.views.picture import pyplot, save_picture

_MOST_LABELS = 48
"""Layers whose names fit beside a picture; of more, some at even distances are named."""


def draw_overlap(found: Overlap, names: Sequence[str], path: Path) -> None:
    """The shares of energy as a picture: every two adapters over all layers, and by layer.

    Args:
        found: of `adapters.overlap.overlap`.
        names: of the adapters.
        path: PNG, SVG or PDF by its ending.

    Raises:
        InputError: the file cannot be written.
    """
    plot = pyplot()
    from matplotlib.ticker import PercentFormatter

    labels = [f"{i} {Path(name).name or name}" for i, name in enumerate(names, 1)]
    number, layers = len(names), len(found.layers)
    figure, (left, right) = plot.subplots(
        1, 2, figsize=(4.5 + 0.5 * number + 0.5 * len(found.pairs), max(3.5, 0.16 * layers + 1.5)),
        layout="constrained",
    )  # fmt: skip
    try:
        most = _largest_share(found)
        _draw_adapters(found, labels, most, left)
        image = _draw_layers(found, most, right)
        figure.colorbar(
            image, ax=[left, right], label="share of energy", shrink=0.8, extend="max",
            format=PercentFormatter(1.0, decimals=0),
        )  # fmt: skip
        for axes in (left, right):
            for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
                text.set_parse_math(False)  # a $ in a name is no formula
        save_picture(figure, path, "--picture")
    finally:
        plot.close(figure)


def _largest_share(found: Overlap) -> float:
    """Where the colours end: the largest share of any two adapters, at least 5%.

    What an adapter shares with itself is beyond them, so that small shares can be told apart.
    """
    pairs = [*found.pairs, *(pair for layer in found.layers.values() for pair in layer.pairs)]
    return max([0.05, *(share or 0.0 for pair in pairs for share in pair.shared)])


def _draw_adapters(found: Overlap, labels: Sequence[str], most: float, axes: Any) -> None:
    """A square for every two adapters: the row's energy within the column's directions."""
    number = len(labels)
    shares = [[1.0] * number for _ in range(number)]
    for pair in found.pairs:
        shares[pair.first][pair.second] = pair.shared[0] or 0.0
        shares[pair.second][pair.first] = pair.shared[1] or 0.0
    axes.imshow(shares, vmin=0, vmax=most, cmap="viridis", aspect="equal")
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if number <= 12:
                colour = "black" if share > 0.6 * most else "white"
                axes.text(j, i, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(number), range(1, number + 1), fontsize=8)
    axes.set_yticks(range(number), labels, fontsize=8)
    axes.set_title("energy of the row within the column", fontsize=9, loc="left")


def _draw_layers(found: Overlap, most: float, axes: Any) -> Any:
    """A row for every layer, a column for every two adapters: the mean of both shares."""
    rows = [[mean_shared(pair) for pair in layer.pairs] for layer in found.layers.values()]
    image = axes.imshow(rows, vmin=0, vmax=most, cmap="viridis", aspect="auto")
    pairs = [f"{pair.first + 1} {pair.second + 1}" for pair in found.pairs]
    axes.set_xticks(range(len(pairs)), pairs, rotation=90 if len(pairs) > 8 else 0, fontsize=8)
    step = -(-len(rows) // _MOST_LABELS)
    shown = list(enumerate(found.layers))[::step]
    axes.set_yticks([i for i, _ in shown], [name for _, name in shown], fontsize=7)
    axes.set_title("by layer, of every two adapters", fontsize=9, loc="left")
    return image

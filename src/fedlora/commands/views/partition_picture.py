"""Draws who holds what as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.commands.views.partition import COLOURS, Division, brief
from fedlora.commands.views.picture import pyplot, save_picture


def draw_partition(division: Division, path: Path) -> None:
    """The bars as a picture: PNG, SVG or PDF by the file's ending.

    Raises:
        InputError: the file cannot be written.
    """
    plot = pyplot()
    clients = len(division.counts)
    figure, axes = plot.subplots(figsize=(8, max(2.5, 0.32 * clients + 1.2)))
    try:
        _draw_bars(division, axes)
        save_picture(figure, path)
    finally:
        plot.close(figure)


def _draw_bars(division: Division, axes: Any) -> None:
    """A bar for each client on matplotlib's axes, divided by values, with a legend."""
    places, left, handles = list(range(len(division.counts))), [0] * len(division.counts), []
    for i in range(len(division.values)):
        sizes = [counts[i] for counts in division.counts]
        bars = axes.barh(places, sizes, left=left, color=COLOURS[i % len(COLOURS)], height=0.8)
        handles.append(bars)
        left = [x + y for x, y in zip(left, sizes, strict=True)]
    labels = [
        f"{k} {name}".strip() + (f"  (r={rank})" if rank else "")
        for k, (name, rank) in enumerate(zip(division.names, division.ranks, strict=True))
    ]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel("rows")
    title = axes.set_title(division.heading, fontsize=9, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    texts = [*axes.get_yticklabels(), title]
    if division.column is not None:
        names = [brief(value) for value in division.values]
        legend = axes.legend(
            handles, names, title=division.column,
            fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
        )  # fmt: skip
        texts += [*legend.get_texts(), legend.get_title()]
    for text in texts:
        text.set_parse_math(False)  # a $ in the data is no formula

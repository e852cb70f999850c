"""Draws the report's plots for a paper, as PNG files or as a PDF with a page per figure."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from fedlora.commands.report.collect import Collected, RunView
from fedlora.commands.report.verb import write
from fedlora.text import human_bytes

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B0568A", "#B97A00", "#3A94CC", "#16191D", "#7A7F85")
BARS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8C8C8C",
    "#9467BD", "#A6761D",
)  # fmt: skip
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo", "||", "**")
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 2)))
MARKS = "os^DvP"
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E9ED",
    "axes.axisbelow": True,
    "axes.edgecolor": "#9AA3AD",
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,  # text in a PDF stays text
}


def draw(collected: Collected, file: Path, formats: Sequence[str]) -> list[Path]:
    """Write the figures beside each other, named after `file`.

    Raises:
        InputError: a file cannot be written.
    """
    written: list[Path] = []
    with warnings.catch_warnings(), pyplot.rc_context(STYLE):
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figures = {name: figure for name, make in FIGURES.items() if (figure := make(collected))}
        try:
            if "png" in formats:
                for name, figure in figures.items():
                    out = io.BytesIO()
                    figure.savefig(out, format="png", dpi=200, bbox_inches="tight")
                    path = file.with_name(f"{file.stem}-{name}.png")
                    written.append(write(path, out.getvalue()))
            if "pdf" in formats:
                out = io.BytesIO()
                with PdfPages(out, metadata={"Title": collected.title}) as pages:
                    for figure in figures.values() or [_nothing(collected)]:
                        pages.savefig(figure, bbox_inches="tight")
                written.append(write(file.with_suffix(".pdf"), out.getvalue()))
        finally:
            pyplot.close("all")
    return written


def _nothing(collected: Collected) -> Figure:
    """A page that says what is missing, where there is nothing to draw."""
    figure = pyplot.figure(figsize=(6.5, 3))
    problems = [f"{run.label}: {problem}" for run in collected.runs for problem in run.problems]
    figure.text(0.02, 0.9, _plain("\n".join(["Nothing to draw.", *problems])), va="top", wrap=True)
    return figure


def _grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns if columns > 1 else 5.2, height * rows),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.remove()
    return figure, flat[:count]


def _plain(text: str) -> str:
    """Text of the user is no formula."""
    return text.replace("$", r"\$")


def _shown(collected: Collected) -> list[RunView]:
    """One run of every series: those of other seeds look alike."""
    return [collected.runs[series.runs[0]] for series in collected.series]


def _rounds(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _line(axes: Axes, i: int, x: Sequence[float], y: Sequence[float], label: str) -> None:
    axes.plot(
        x, y, label=_plain(label), color=COLOURS[i % len(COLOURS)],
        linestyle=DASHES[i % len(DASHES)],
        marker=MARKS[i % len(MARKS)], markersize=4, markevery=max(1, len(x) // 12), linewidth=1.5,
    )  # fmt: skip


def quality(collected: Collected) -> Figure | None:
    """Every measure by round, with bands of one standard deviation."""
    drawn = [x for x in collected.panels if any(len(y.curve.rounds) > 1 for y in x.lines)]
    if not drawn:
        return None
    figure, flat = _grid(len(drawn), 2 if len(drawn) <= 8 else 3, 2.4)
    labels = list(dict.fromkeys(x.label for panel in drawn for x in panel.lines))
    handles: dict[str, Any] = {}
    for axes, panel in zip(flat, drawn, strict=True):
        for one in panel.lines:
            i, c = labels.index(one.label), one.curve
            _line(axes, i, c.rounds, c.mean, one.label)
            sd = np.array([x or 0.0 for x in c.sd])
            if sd.any():
                mean = np.array(c.mean)
                low, high = mean - sd, mean + sd
                if panel.percent:  # no share lies beyond these
                    low, high = low.clip(min=0), high.clip(max=1)
                colour, shown = COLOURS[i % len(COLOURS)], low > 0 if panel.log else None
                axes.fill_between(c.rounds, low, high, shown, color=colour, alpha=0.18, lw=0)
        axes.set_title(_plain(panel.title) + (", log scale" if panel.log else ""))
        _rounds(axes)
        if panel.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        if panel.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if len(labels) > 1:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", frameon=False,
            ncols=min(4, len(labels)),
        )  # fmt: skip
    return figure


def data(collected: Collected) -> Figure | None:
    """Rows of every client by kind."""
    runs = [run for run in _shown(collected)[:1] if any(run.clients.rows)]
    if not runs:
        return None
    clients = runs[0].clients
    figure, (axes,) = _grid(1, 1, 3.0)
    kinds = clients.kinds or ("rows",)
    cells = clients.counts or tuple((n or 0,) for n in clients.rows)
    places, bottom = np.arange(len(clients.ids)), np.zeros(len(clients.ids))
    for j, kind in enumerate(kinds):
        sizes = np.array([row[j] for row in cells])
        axes.bar(
            places, sizes, bottom=bottom, label=_plain(kind), color=BARS[j % len(BARS)],
            hatch=HATCHES[j % len(HATCHES)], edgecolor="white", linewidth=0.3,
        )  # fmt: skip
        bottom = bottom + sizes
    if len(places) <= 24:
        names = zip(clients.ids, clients.ranks, strict=True)
        axes.set_xticks(places, [f"{i}\n{'?' if r is None else r}" for i, r in names])
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("client, and its rank" if len(places) <= 24 else "client")
    axes.set_ylabel("rows")
    if len(kinds) > 1:
        figure.legend(loc="outside right upper", frameon=False, title=_plain(clients.column or ""))
    return figure


def changes(collected: Collected) -> Figure | None:
    """Every client before and after, by the leading measure."""
    runs = [run for run in _shown(collected) if run.changes][:6]
    if not runs:
        return None
    figure, flat = _grid(len(runs), 2, 2.4)
    marks = {
        "before": ("before training", "o", "#7A7F85", "none"),
        "after": ("global model", "o", COLOURS[0], COLOURS[0]),
        "personal": ("client's own model", "D", COLOURS[1], COLOURS[1]),
    }
    for axes, run in zip(flat, runs, strict=True):
        change = run.changes[0]
        for key, (label, mark, colour, face) in marks.items():
            points = [(i, y) for i, y in enumerate(change[key]) if y is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), mark, label=label, color=colour,
                    markerfacecolor=face, markersize=4.5,
                )  # fmt: skip
        axes.set_title(_plain(f"{run.label}: {change['title'].lower()}") if len(runs) > 1 else "")
        axes.set_ylabel("" if len(runs) > 1 else change["title"])
        axes.set_xlabel("client")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if change["percent"]:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=3)
    return figure


def error(collected: Collected) -> Figure | None:
    """Aggregation error by layer and round."""
    runs = [
        run for run in _shown(collected) if any(x is not None for y in run.errors.cells for x in y)
    ][:6]
    if not runs:
        return None
    layers = max(len(run.errors.layers) for run in runs)
    figure, flat = _grid(len(runs), 2, max(2.2, min(6.0, 0.9 + 0.14 * layers)))
    for axes, run in zip(flat, runs, strict=True):
        e = run.errors
        cells = np.array([[math.nan if x is None else x for x in row] for row in e.cells])
        positive = cells[cells > 0]
        scale: Normalize = (
            LogNorm(positive.min(), max(positive.max(), positive.min() * 1.001))
            if positive.size
            else Normalize(0, 1)
        )
        if positive.size:  # exactly 0 has no logarithm; it is drawn as the least
            cells = np.where(cells == 0, positive.min(), cells)
        image = axes.imshow(cells, aspect="auto", norm=scale, cmap="viridis", interpolation="none")
        axes.set_title(_plain(run.label) if len(runs) > 1 else "")
        axes.grid(visible=False)
        shown = np.linspace(0, len(e.layers) - 1, min(len(e.layers), 28)).round().astype(int)
        axes.set_yticks(shown, [_plain(_tail(e.layers[i])) for i in shown], fontsize=6.5)
        ticks = np.linspace(0, len(e.rounds) - 1, min(len(e.rounds), 8)).round().astype(int)
        axes.set_xticks(ticks, [str(e.rounds[i]) for i in ticks])
        axes.set_xlabel("round")
        figure.colorbar(image, ax=axes, label="relative error", shrink=0.9)
    return figure


def _tail(name: str) -> str:
    """`model.layers.0.self_attn.q_proj` -> `0.q_proj`."""
    parts = name.split(".")
    depth = [x for x in parts[:-1] if x.isdecimal()]
    return ".".join([*depth[-1:], parts[-1]])


def spectrum(collected: Collected) -> Figure | None:
    """Singular values of the global update, a line per layer."""
    runs = [run for run in _shown(collected) if run.spectrum.layers][:6]
    if not runs:
        return None
    figure, flat = _grid(len(runs), 2, 2.5)
    shades = matplotlib.colormaps["viridis"]
    for axes, run in zip(flat, runs, strict=True):
        layers = run.spectrum.layers
        for i, layer in enumerate(layers):
            shade = shades(0.9 * i / max(len(layers) - 1, 1))
            places = range(1, len(layer.values) + 1)
            axes.plot(places, layer.values, color=shade, linewidth=0.9)
        axes.set_yscale("log")
        axes.set_title(_plain(run.label) if len(runs) > 1 else "")
        axes.set_xlabel("singular value, the largest first")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    image = matplotlib.cm.ScalarMappable(Normalize(0, 1), shades)
    bar = figure.colorbar(image, ax=flat, ticks=[0, 1], aspect=30)
    bar.ax.set_yticklabels(["first layer", "last"])
    return figure


def traffic(collected: Collected) -> Figure | None:
    """Bytes of all clients by round, against both bounds."""
    runs = [run for run in _shown(collected) if run.traffic.rounds][:6]
    if not runs:
        return None
    figure, flat = _grid(len(runs), 2, 2.4)
    handles: dict[str, Any] = {}
    for axes, run in zip(flat, runs, strict=True):
        f = run.traffic
        took = [[i for i, x in enumerate(row) if x is not None] for row in f.up]
        for i, (label, rows) in enumerate((("up", f.up), ("down", f.down))):
            sums = [sum(x or 0 for x in row) or math.nan for row in rows]
            _line(axes, i, f.rounds, sums, label)
        own = [[f.lower[i] for i in x] for x in took]
        if own and all(x is not None for row in own for x in row):
            least = [sum(x or 0 for x in row) for row in own]
            axes.plot(f.rounds, least, color=COLOURS[2], lw=4, alpha=0.4, label="trained factors")
        if f.upper is not None:
            most = [len(x) * f.upper for x in took]
            axes.plot(f.rounds, most, color=COLOURS[3], lw=4, alpha=0.4, label="whole base")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: human_bytes(y)))
        axes.set_title(_plain(run.label) if len(runs) > 1 else "")
        _rounds(axes)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", frameon=False, ncols=4
    )
    return figure


def seconds(collected: Collected) -> Figure | None:
    """Time by phase and round."""
    runs = [run for run in _shown(collected) if run.seconds][:6]
    if not runs:
        return None
    figure, flat = _grid(len(runs), 2, 2.2)
    handles: dict[str, Any] = {}
    for axes, run in zip(flat, runs, strict=True):
        bottom = np.zeros(len(run.traffic.rounds))
        for i, (phase, values) in enumerate(run.seconds.items()):
            sizes = np.array([x or 0.0 for x in values])
            axes.bar(
                run.traffic.rounds, sizes, bottom=bottom, label=_plain(phase),
                color=BARS[i % len(BARS)],
                hatch=HATCHES[i % len(HATCHES)], edgecolor="white", linewidth=0.3,
            )  # fmt: skip
            bottom = bottom + sizes
        axes.set_title(_plain(run.label) if len(runs) > 1 else "")
        axes.set_ylabel("seconds")
        axes.grid(axis="x", visible=False)
        _rounds(axes)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", frameon=False, ncols=4
    )
    return figure


def privacy(collected: Collected) -> Figure | None:
    """Epsilon by round."""
    runs = [run for run in collected.runs if any(x[1] is not None for x in run.privacy)]
    if not runs:
        return None
    figure, (axes,) = _grid(1, 1, 2.6)
    for i, run in enumerate(runs):
        spent = [(r, epsilon) for r, epsilon, _ in run.privacy if epsilon is not None]
        _line(axes, i, [r for r, _ in spent], [x for _, x in spent], run.label)
    axes.set_ylabel("epsilon")
    _rounds(axes)
    if len(runs) > 1:
        figure.legend(loc="outside right upper", frameon=False)
    return figure


FIGURES: Mapping[str, Callable[[Collected], Figure | None]] = {
    "data": data,
    "quality": quality,
    "clients": changes,
    "error": error,
    "spectrum": spectrum,
    "bytes": traffic,
    "seconds": seconds,
    "privacy": privacy,
}
"""By the part of the file's name."""

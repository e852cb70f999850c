"""Shows a person how a study goes on, a line per run, and its tables at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table as RichTable
from rich.text import Text

from fedlora.commands.study.plan import Planned, Study
from fedlora.commands.study.statistics import Difference, mean_and_sd
from fedlora.commands.study.tables import Table
from fedlora.commands.study.tables_markdown import scale_of


class Progress:
    """A bar for all runs and one for each that goes on; plain lines where there is no terminal."""

    def __init__(self, study: Study, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total = len({run.directory for run in study.runs})
        self.kept = self.ended = 0
        self.running: dict[str, tuple[Any, float]] = {}
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            speed_estimate_period=24 * 3600,
        )
        self.all = self.bars.add_task("runs", total=self.total)

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, what: str, run: Planned, message: Mapping[str, Any]) -> None:
        """Show what happened to a run."""
        name = " ".join([*run.labels.values(), f"seed {run.seed}"])
        if what == "kept":
            self.kept += 1
            self.bars.update(self.all, total=self.total - self.kept)
        elif what == "start":
            task = self.bars.add_task(f"  {name}", total=run.keys.get("num_rounds"))
            self.running[run.directory] = (task, time.perf_counter())
        elif what == "round":
            self.bars.update(self.running[run.directory][0], completed=message["round"])
        else:
            task, began = self.running.pop(run.directory)
            self.bars.remove_task(task)
            self.ended += 1
            self.bars.update(self.all, completed=self.ended)
            outcome = "" if what == "done" else f"  FAILED: {message['failed']}"
            done = f"{self.kept + self.ended}/{self.total}"
            line = f"{done}  {name}  {time.perf_counter() - began:.0f} s{outcome}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_tables(tables: Sequence[Table], console: Console | None = None) -> None:
    """The tables in a terminal, cell by cell: value, difference to the reference, verdict."""
    console = console or Console()
    for table in tables:
        part, (factor, unit) = table.part, scale_of(table.part.metric)
        digits = 1 if unit else 4
        shown = RichTable(box=SIMPLE_HEAD, title=f"{part.name}: {part.title}", title_justify="left")
        shown.add_column(part.compare, overflow="fold")
        for name in (part.metric + (f" {unit}" if unit else ""), "sd", "seeds"):
            shown.add_column(name, justify="right", no_wrap=True)
        shown.add_column(f"to {part.reference}", justify="right", no_wrap=True)
        shown.add_column("95% interval", justify="right", no_wrap=True)
        shown.add_column("", no_wrap=True)
        for cell in table.cells:
            if cell:
                shown.add_section()
                shown.add_row(Text("\n".join(cell), style="bold"))
            for row in (row for row in table.rows if row.cell == cell):
                mean, sd = mean_and_sd([factor * x for x in row.values])
                x = row.difference
                verdict = x.verdict(table.greater) if x else ""
                shown.add_row(
                    row.label,
                    f"{mean:.{digits}f}",
                    "-" if sd is None else f"{sd:.{digits}f}",
                    str(len(row.values)),
                    f"{factor * x.mean:+.{digits}f}" if x else "",
                    _interval(x, factor, digits),
                    Text(verdict, style={"wins": "green", "loses": "red"}.get(verdict, "")),
                )
        console.print(shown)
        if table.missing:
            console.print(f"{len(table.missing)} runs are missing; see table.md", highlight=False)


def _interval(x: Difference | None, factor: float, digits: int) -> str:
    if x is None or x.low is None or x.high is None:
        return ""
    return f"{factor * x.low:+.{digits}f} to {factor * x.high:+.{digits}f}"

"""What a person sees: bars and a table in a terminal, plain lines elsewhere, JSON for machines.

Each is a function of the events a run reports (`fedlora.engines.local.Report`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Event = Mapping[str, Any]
_EVERY_STEP = {"step", "client_begin", "client_end", "round_begin", "evaluate_begin"}


def human_bytes(count: float) -> str:
    """`1536` -> `1.5 KB`; units of 1,000 bytes."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def json_lines(event: Event) -> None:
    """One JSON object per line on standard output, without the events of single steps."""
    if event["event"] not in _EVERY_STEP:
        print(json.dumps(event), flush=True)


_HEADER = (
    f"{'round':>5} {'loss':>8} {'ppl':>8} {'token acc':>9} {'exact':>7} {'agg. error':>10} "
    f"{'up':>9} {'down':>9} {'seconds':>8}"
)


def _row(event: Event) -> str:
    """A line of the table of rounds."""
    found = event.get("evaluation") or {}

    def number(key: str, form: str) -> str:
        value = found.get(key)
        return "-" if value is None else format(value, form)

    error = event.get("aggregation_error")
    seconds = sum((event.get("seconds") or {}).values())
    is_round = event["event"] == "round"
    return (
        f"{event['round']:>5} {number('loss', '.4f'):>8} {number('perplexity', '.5g'):>8} "
        f"{number('token_accuracy', '.1%'):>9} {number('exact_match', '.1%'):>7} "
        f"{'-' if error is None else format(error, '.1e'):>10} "
        f"{human_bytes(event['bytes_up']) if is_round else '-':>9} "
        f"{human_bytes(event['bytes_down']) if is_round else '-':>9} "
        f"{format(seconds, '.1f') if is_round else '-':>8}"
    )


def _introduction(event: Event) -> list[str]:
    ranks, rows = event["ranks"], event["rows"]
    begun = event["resumed_from"]
    lines = [
        f"{event['model']}: {event['modules']} target modules, method {event['method']}, "
        f"{event['num_rounds']} rounds -> {event['output_dir']}",
        f"{len(ranks)} clients, ranks {_short(ranks)}, rows {_short(rows)}; "
        f"{event['eval_rows']} rows to evaluate on",
    ]
    if begun is not None:
        lines.append(f"resumed after round {begun}" if begun else "resumed from the start")
    return lines


def _short(values: list[int]) -> str:
    if len(values) <= 12:
        return " ".join(map(str, values))
    return " ".join(map(str, values[:8])) + f" ... (from {min(values)} to {max(values)})"


def plain_lines(event: Event) -> None:
    """Lines for a log file: no bars, no colours."""
    kind = event["event"]
    if kind == "begin":
        print("\n".join([*_introduction(event), _HEADER]), flush=True)
    elif kind in ("start", "round"):
        print(_row(event), flush=True)
    elif kind == "warning":
        print(f"warning: {event['message']}", file=sys.stderr, flush=True)


class Terminal:
    """Progress bars for rounds, clients and steps, and a table that grows above them.

    Use as a context manager, so that the cursor comes back whatever happens.
    """

    def __init__(self, console: Console | None = None, title: str = "") -> None:
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            transient=True,
        )
        self.title = title
        self.clients: list[int] = []
        self.done = 0
        self.tokens, self.since = 0, time.perf_counter()

    def __enter__(self) -> Terminal:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        kind = event["event"]
        if kind == "begin":
            self._begin(event)
        elif kind in ("start", "round"):
            self.console.print(_row(event), highlight=False)
            self.progress.update(self.rounds, completed=event["round"])
            self.progress.update(self.steps, note="")
        elif kind == "warning":
            self.console.print(f"[yellow]warning:[/] {event['message']}", highlight=False)
        elif kind == "round_begin":
            self.clients, self.done = event["clients"], 0
            self.progress.reset(self.each, total=len(self.clients), note="")
        elif kind == "client_begin":
            self.progress.update(self.each, note=f"client {event['client']}, r={event['rank']}")
            self.progress.reset(self.steps, note="")
            self.tokens, self.since = 0, time.perf_counter()
        elif kind == "step":
            self._step(event)
        elif kind == "client_end":
            self.done += 1
            self.progress.update(self.each, completed=self.done)
        elif kind == "evaluate_begin":
            self.progress.update(self.steps, note="evaluating")

    def _begin(self, event: Event) -> None:
        for line in _introduction(event):
            self.console.print(line, highlight=False)
        self.console.print(f"[bold]{_HEADER}[/]", highlight=False)
        self.first = event["resumed_from"] or 0
        self.rounds = self.progress.add_task(
            f"{self.title}rounds", total=event["num_rounds"], completed=self.first, note=""
        )
        self.each = self.progress.add_task("clients", total=len(event["ranks"]), note="")
        self.steps = self.progress.add_task("steps", total=None, note="")

    def _step(self, event: Event) -> None:
        self.tokens += event["tokens"]
        rate = self.tokens / max(time.perf_counter() - self.since, 1e-9)
        self.progress.update(
            self.steps,
            total=event["steps"],
            completed=event["step"],
            note=f"loss {event['loss']:.3f}, {rate:,.0f} tokens/s",
        )


def reporter(as_json: bool) -> Callable[[Event], None] | Terminal:
    """The right one for where standard output goes."""
    if as_json:
        return json_lines
    console = Console()
    return Terminal(console) if console.is_terminal else plain_lines

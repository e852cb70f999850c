"""Shows a run to a person: bars in a terminal, plain lines elsewhere, JSON for programs.

Each is a function of the events a run reports (`fedlora.runs.events.Report`).
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fedlora.commands.json_lines import Emit
from fedlora.runs.events import DETAILS, Event, Report
from fedlora.text import human_bytes


def quiet_libraries() -> None:
    """Progress bars and advice of libraries would tear our own output apart."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def json_events(emit: Emit) -> Report:
    """One JSON object per line, without the details of a round."""

    def told(event: Event) -> None:
        if event["event"] not in DETAILS:
            emit(event)

    return told


_MEASURES = {
    "CAUSAL_LM": (
        ("loss", "loss", 8, ".4f"),
        ("perplexity", "ppl", 8, ".5g"),
        ("token_accuracy", "token acc", 9, ".1%"),
        ("exact_match", "exact", 6, ".1%"),
    ),
    "SEQ_CLS": (
        ("loss", "loss", 8, ".4f"),
        ("accuracy", "accuracy", 8, ".1%"),
        ("macro_f1", "macro F1", 9, ".1%"),
    ),
}
"""By task: metric, heading, width, form."""


def _header(task: str) -> str:
    measures = " ".join(f"{heading:>{width}}" for _, heading, width, _ in _MEASURES[task])
    return f"{'round':>5} {measures} {'agg. err':>8} {'up':>8} {'down':>8} {'seconds':>7}"


def _row(event: Event, task: str) -> str:
    """A line of the table of rounds; it fits into a terminal of 80 columns."""
    evaluation = event.get("evaluation") or {}
    cells = []
    for key, _, width, form in _MEASURES[task]:
        value = evaluation.get(key)
        if key == "perplexity" and value is not None and value >= 1e5:
            form = ".1e"
        cells.append(f"{'-' if value is None else format(value, form):>{width}}")
    error = event.get("aggregation_error")
    seconds = sum((event.get("seconds") or {}).values())
    is_round = event["event"] == "round"
    return (
        f"{event['round']:>5} {' '.join(cells)} "
        f"{'-' if error is None else format(error, '.1e'):>8} "
        f"{human_bytes(event['bytes_up']) if is_round else '-':>8} "
        f"{human_bytes(event['bytes_down']) if is_round else '-':>8} "
        f"{format(seconds, '.1f') if is_round else '-':>7}"
    )


ENDS = 10
"""Labels shown from either end of a table that would be too long."""


def per_class(evaluation: Mapping[str, Any], where: str) -> list[str]:
    """A classifier's last evaluation, a line per label; nothing for a language model.

    Of more than twice `ENDS` labels those with the worst and the best F1 are shown; lines say how
    many are not, and where all are.

    Args:
        evaluation: of a round.
        where: the run's directory.
    """
    scores = evaluation.get("per_class")
    if not scores:
        return []
    parts, note = [list(scores)], ""
    if len(scores) > 2 * ENDS:
        measured = sorted(
            (n for n in scores if scores[n]["support"]), key=lambda n: scores[n]["f1"]
        )
        parts = [measured[:ENDS], measured[ENDS:][-ENDS:]]
        left, unseen = max(len(measured) - 2 * ENDS, 0), len(scores) - len(measured)
        omitted = [f"{left} labels between these"] * (left > 0)
        omitted += [f"{unseen} without a row to evaluate on"] * (unseen > 0)
        note = f"... left out: {' and '.join(omitted)}"
    width = max(5, *(len(name) for part in parts for name in part))
    lines = [f"{'label':<{width}} {'precision':>9} {'recall':>7} {'F1':>7} {'rows':>6}"]
    for i, part in enumerate(parts):
        lines += [note] * (i > 0)
        for name in part:
            x = scores[name]
            lines.append(
                f"{name:<{width}} {x['precision']:>9.1%} {x['recall']:>7.1%} {x['f1']:>7.1%} "
                f"{x['support']:>6}"
            )
    if note:
        lines.append(f"the worst and the best by F1; all {len(scores)} labels: metrics.jsonl, or")
        lines.append(f"fedlora report {shlex.quote(where)}")
    return lines


def _introduction(event: Event) -> list[str]:
    """What is said of a run as it begins: model, clients, choices, and whether it goes on."""
    ranks, rows = event["ranks"], event["rows"]
    begun = event["resumed_from"]
    lines = [
        f"{event['model']}: {event['modules']} target modules, method {event['method']}, "
        f"{event['num_rounds']} rounds -> {event['output_dir']}",
        f"{len(ranks)} clients, ranks {_short(ranks)}, rows {_short(rows)}; "
        f"{event['eval_rows']} rows to evaluate on",
    ]
    if event["choices"]:
        lines.append("; ".join(event["choices"]))
    if begun is not None:
        lines.append(f"resumed after round {begun}" if begun else "resumed from the start")
    return lines


def _short(values: list[int]) -> str:
    if len(values) <= 12:
        return " ".join(map(str, values))
    return " ".join(map(str, values[:8])) + f" ... (from {min(values)} to {max(values)})"


class PlainLines:
    """Lines for a log file: no bars, no colours."""

    def __init__(self) -> None:
        self.task = "CAUSAL_LM"

    def __call__(self, event: Event) -> None:
        """Print an event."""
        kind = event["event"]
        if kind == "begin":
            self.task = event["task"]
            print("\n".join([*_introduction(event), _header(self.task)]), flush=True)
        elif kind in ("start", "round"):
            print(_row(event, self.task), flush=True)
        elif kind == "warning":
            print(f"warning: {event['message']}", file=sys.stderr, flush=True)


class _Count(MofNCompleteColumn):
    """`3/10`, and nothing where the total is unknown."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


class Terminal:
    """Progress bars for rounds, clients and steps, and a table that grows above them.

    Use as a context manager, so that the cursor comes back whatever happens.
    """

    def __init__(self, console: Console | None = None, title: str = "") -> None:
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            _Count(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            transient=True,
            speed_estimate_period=3600,  # a round may take long
        )
        self.title, self.task = title, "CAUSAL_LM"
        self.clients: list[int] = []
        self.finished, self.done = 0, 0  # rounds, clients of this round
        self.running: dict[int, float] = {}  # clients that train now, and how far they are
        self.loading = self.progress.add_task("loading model and data", total=None, note="")
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
            self._print(_row(event, self.task), no_wrap=True)
            self.finished, self.done = event["round"], 0
            self.progress.update(self.rounds, completed=event["round"])
            self.progress.update(self.steps, note="")
        elif kind == "warning":
            self._print(Text.assemble(("warning:", "yellow"), f" {event['message']}"))
        elif kind == "round_begin":
            self.clients, self.done, self.running = event["clients"], 0, {}
            self.progress.reset(self.each, total=len(self.clients), note="")
        elif kind == "client_begin":
            self._client_begin(event)
        elif kind == "step":
            self._step(event)
        elif kind == "client_end":
            self.done += 1
            self.running.pop(event["client"], None)
            self._advance()
        elif kind == "evaluate_begin":
            self.progress.update(self.steps, note="evaluating")

    def _begin(self, event: Event) -> None:
        self.progress.remove_task(self.loading)
        self.task = event["task"]
        for line in _introduction(event):
            self._print(line)
        self._print(Text(_header(self.task), style="bold"), no_wrap=True)
        self.finished = event["resumed_from"] or 0
        self.rounds = self.progress.add_task(
            f"{self.title}rounds", total=event["num_rounds"], completed=self.finished, note=""
        )
        self.each = self.progress.add_task("clients", total=len(event["ranks"]), note="")
        self.steps = self.progress.add_task("steps", total=None, note="")

    def _client_begin(self, event: Event) -> None:
        if not self.running:
            self.progress.reset(self.steps, note="")
            self.tokens, self.since = 0, time.perf_counter()
        self.running[event["client"]] = 0.0
        number = len(self.running)
        note = f"client {event['client']}, r={event['rank']}"
        self.progress.update(self.each, note=note if number == 1 else f"{number} in one pass")

    def _step(self, event: Event) -> None:
        self.tokens += event["tokens"]
        rate = self.tokens / max(time.perf_counter() - self.since, 1e-9)
        self.progress.update(
            self.steps,
            total=event["steps"],
            completed=event["step"],
            note=f"loss {event['loss']:.3f}, {rate:,.0f} tokens/s",
        )
        self.running[event["client"]] = event["step"] / event["steps"]
        self._advance()

    def _advance(self) -> None:
        """Move the upper bars by fractions, so that time left is known before a round ends."""
        clients = self.done + sum(self.running.values())
        self.progress.update(self.each, completed=clients)
        share = clients / max(len(self.clients), 1)
        self.progress.update(self.rounds, completed=self.finished + share)

    def _print(self, line: str | Text, no_wrap: bool = False) -> None:
        self.console.print(line, markup=False, highlight=False, no_wrap=no_wrap, overflow="fold")


@contextmanager
def reporter(
    emit: Emit | None = None, console: Console | None = None, title: str = ""
) -> Iterator[Report]:
    """The right view for where standard output goes, for as long as a run lasts."""
    console = console or Console()
    if emit:
        yield json_events(emit)
    elif console.is_terminal and not console.is_dumb_terminal:
        with Terminal(console, title) as terminal:
            yield terminal
    else:
        yield PlainLines()

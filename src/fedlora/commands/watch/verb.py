"""Runs `fedlora watch`: look at a run that goes on elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fedlora.commands.json_lines import Emit
from fedlora.commands.look import Look, Reader
from fedlora.commands.run_files import Line, mapping, number, whole
from fedlora.commands.watch.client_table import clients
from fedlora.commands.watch.figures import elapsed, figure, seconds_of, time_left
from fedlora.commands.watch.view import status, traffic, view
from fedlora.config.arguments import Option, Syntax, take
from fedlora.errors import InputError

HELP = """\
fedlora watch DIR [--once] [--interval SECONDS] [--json]

Looks at the run in DIR while it goes on elsewhere: rounds and the time left, what every client is
doing, in how many of the rounds that asked it its update counts, who was left out of the last round
and why, the loss within rounds and the evaluation over them, bytes. It reads the run's files and
nothing else, so that it neither slows a run down nor stops it; Ctrl-C leaves the view. It ends with
the run. Where the output is no terminal it writes a line per round instead.

  --once              the state now, then exit
  --interval SECONDS  between two looks (1)
  --json              one JSON object now and whenever something has changed: round, share of it
                      that is done, seconds and seconds_left, clients, the last evaluation, status

Examples:
  fedlora watch out
  ssh gpu-box fedlora watch --once runs/long
"""
SYNTAX = Syntax(
    {
        "once": Option("the state now, then exit", flag=True),
        "interval": Option("seconds between two looks"),
    },
    Option("the output directory of a run", path="directory"),
)


def _told(look: Look, line: Line) -> str:
    """A round as a line of a log."""
    scores = {k: number(x) for k, x in mapping(line.get("evaluation")).items()}
    figures = [f"{name} {figure(name, x)}" for name, x in scores.items() if x is not None]
    sizes = traffic(*(whole(line.get(f"bytes_{way}")) or 0 for way in ("up", "down")))
    seconds = f"{seconds_of(line):.1f} s"
    return f"round {line['round']} of {look.num_rounds}: {', '.join([*figures, sizes, seconds])}"


def _tell(reader: Reader, interval: float, console: Console) -> None:
    """Lines for a log: the state now, then what changes."""
    shown_round: int | None = None
    waiting = False
    while True:
        look = reader.look()
        if look is None:
            if not waiting:
                print(f"waiting for {reader.path}: no run there yet", flush=True)
            waiting = True
        elif shown_round is None:
            console.print(view(look, console.width, 40), soft_wrap=True)
        else:
            for line in look.rounds:
                if line["round"] > shown_round:
                    print(_told(look, line), flush=True)
            if not look.alive:
                print(status(look), flush=True)
        if look is not None:
            shown_round = look.finished
            if not look.alive:
                return
        time.sleep(interval)


def _show(reader: Reader, interval: float, console: Console) -> None:
    """The whole terminal, until the run is over; then its last state stays."""
    look: Look | None = None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while look is None or look.alive:
            look = reader.look()
            if look is None:
                shown: Text | Group = Text(f"waiting for {reader.path}: no run there yet (Ctrl-C)")
            else:
                shown = view(look, *console.size)
            live.update(shown, refresh=True)
            if look is None or look.alive:
                time.sleep(interval)
    console.print(view(look, console.width, 40))


def _emit_changes(reader: Reader, interval: float, emit: Emit) -> None:
    """The state now, and again whenever the run has written something."""
    emitted: Any = None
    while True:
        look = reader.look()
        if look is None:
            state: dict[str, Any] = {"event": "waiting", "path": str(reader.path)}
            change: Any = "waiting"
        else:
            state = _state(look)
            change = look.last_sign, look.finished, look.alive, look.ended
        if change != emitted:
            emit(state)
            emitted = change
        if look is not None and not look.alive:
            return
        time.sleep(interval)


def _state(look: Look) -> dict[str, Any]:
    """A look, as a program reads it."""
    evaluations = [x for x in (look.run.start, *look.rounds) if x.get("evaluation")]
    last = evaluations[-1] if evaluations else {}
    return {
        "event": "look",
        "path": str(look.path),
        "status": status(look),
        "alive": look.alive,
        "ended": look.ended,
        "round": look.finished,
        "num_rounds": look.num_rounds,
        "attempts": look.attempts,
        "share": look.progress.get("share") if look.alive else None,
        "seconds": elapsed(look),
        "seconds_left": time_left(look),
        "tokens_per_second": look.progress.get("tokens_per_second") if look.alive else None,
        "bytes_up": look.bytes_up,
        "bytes_down": look.bytes_down,
        "evaluated_round": last.get("round"),
        "evaluation": last.get("evaluation"),
        "clients": [{"client": number, **asdict(c)} for number, c in clients(look).items()],
    }


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora watch`."""
    own = take(arguments, SYNTAX)
    once, text = own["once"], own["interval"] or "1"
    try:
        interval = float(text)
    except ValueError:
        raise InputError(f"--interval {text}: expected seconds") from None
    if not 0 < interval < float("inf"):
        raise InputError(f"--interval {text}: expected seconds, more than 0")
    if len(arguments) != 1 or arguments[0].startswith("--"):
        raise InputError("watch: give the output directory of one run; see fedlora watch --help")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # terminals without block characters
    console, reader = Console(highlight=False), Reader(arguments[0])
    if once:
        look = reader.look()
        if look is None:
            raise InputError(f"{reader.path}: no run there; give the output directory of a run")
        if emit:
            emit(_state(look))
        else:
            console.print(view(look, console.width, 60))
        return 0
    try:
        if emit:
            _emit_changes(reader, interval, emit)
        elif console.is_terminal and not console.is_dumb_terminal:
            _show(reader, interval, console)
        else:
            _tell(reader, interval, console)
    except KeyboardInterrupt:
        pass  # leaving a view is no failure
    return 0

"""Runs `fedlora status`: where a run stands, and what part every client has had in it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.commands.json_lines import Emit
from fedlora.commands.look import Look, Participation, Reader
from fedlora.commands.run_files import Line, Run, listed, mapping, number, outcome_of, whole
from fedlora.commands.watch.figures import duration, elapsed, figure, time_left
from fedlora.commands.watch.view import resume_command, title, traffic
from fedlora.config.arguments import Option, Syntax, take
from fedlora.errors import InputError
from fedlora.runs.best_round import Best
from fedlora.runs.file_names import FINAL, ROUND
from fedlora.text import human_bytes

HELP = """\
fedlora status RUN [--json]

Says where the run in RUN stands, once: whether it is running, ended, stopped or failed, round and
attempt, the result so far, bytes up and down, and of every client its rank, its rows, in how many
of the rounds that asked it its update counts, the last of these, and why it was left out last. It
reads the run's files and nothing else, and takes no part of a second, so that scripts can ask it
as often as they like; fedlora watch shows a run while it goes on.

  --json   one JSON object: state (running, ended, stopped, failed), problem, round, num_rounds,
           attempt, seconds, seconds_left, best_round, result, bytes_up, bytes_down, rounds (bytes,
           attempts, and how many clients were asked and what became of them), clients, damage

Whatever the state, the exit code is 0; it is 2 where RUN is no run.

Examples:
  fedlora status out
  fedlora status out --json | jq '.clients[] | select(.reason != "") | {client, reason}'
"""
SYNTAX = Syntax(first=Option("the output directory of a run", path="directory"))

MOST_CLIENTS = 40
"""Clients of a table; `--json` has all of them."""


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora status`.

    Raises:
        InputError: what is given is no run.
    """
    take(arguments, SYNTAX)
    if len(arguments) != 1 or arguments[0].startswith("--"):
        raise InputError("status: give the output directory of one run; see fedlora status --help")
    look = Reader(arguments[0]).look()
    if look is None:
        raise InputError(f"{arguments[0]}: no run there; give the output directory of a run")
    if emit:
        emit(described(look))
        return 0
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # terminals without ·
    show(look, Console(highlight=False))
    return 0


# --- for programs ---


def described(look: Look) -> dict[str, Any]:
    """A look, as a program reads it."""
    best, result = best_round(look.run), result_of(look)
    return {
        "event": "status",
        "path": str(look.path),
        "state": look.state,
        "problem": look.problem or None,
        "phase": look.progress.get("phase") if look.alive else None,
        "round": look.round,
        "num_rounds": look.num_rounds,
        "attempt": look.attempts,
        "seconds": elapsed(look),
        "seconds_left": time_left(look),
        "best_round": best.round,
        "best_value": best.value,
        "result": str(result.path) if result else None,
        "result_round": result.round if result else None,
        "bytes_up": look.bytes_up,
        "bytes_down": look.bytes_down,
        "rounds": [_round(line) for line in look.rounds],
        "clients": [_client(number, part) for number, part in look.participations.items()],
        "damage": list(look.damage),
    }


def _round(line: Line) -> dict[str, Any]:
    """A saved round: its bytes, and what became of the clients it asked."""
    outcomes = [outcome_of(entry) for entry in listed(line.get("clients"))]
    return {
        "round": line["round"],
        "attempts": whole(line.get("attempts")) or 1,
        "asked": len(outcomes),
        **{word: outcomes.count(word) for word in ("counted", "failed", "late", "unneeded")},
        "bytes_up": whole(line.get("bytes_up")),
        "bytes_down": whole(line.get("bytes_down")),
    }


def _client(client: int, part: Participation) -> dict[str, Any]:
    """A client's part in the run."""
    return {
        "client": client,
        "name": part.name,
        "rank": part.rank,
        "rows": part.rows,
        "asked": part.asked,
        "counted": part.counted,
        "last_round": part.last_round,
        "outcome": part.outcome,
        "reason": part.reason,
        "reason_round": part.reason_round,
        "bytes_up": part.bytes_up,
        "bytes_down": part.bytes_down,
    }


# --- what there is ---


@dataclass(frozen=True)
class SavedModel:
    """A model that a run has saved.

    Args:
        path: its directory.
        round: whose it is; None where no line says it.
    """

    path: Path
    round: int | None


def result_of(look: Look) -> SavedModel | None:
    """The newest model that lies in a run's directory; None before the first round."""
    if look.ended:
        return SavedModel(look.path / FINAL, whole(look.run.end.get("final")))
    adapters = [path for path in look.path.iterdir() if (path / _ADAPTER).is_file()]
    found = (ROUND.fullmatch(path.name) for path in adapters)
    rounds = [int(match[1]) for match in found if match]
    return SavedModel(look.path / f"round-{max(rounds)}", max(rounds)) if rounds else None


def best_round(run: Run) -> Best:
    """The best round so far by the metric that decides, and its value."""
    best = Best()
    greater = run.config.get("greater_is_better") is True  # the run has settled it
    for line in (run.start, *run.rounds):
        value = number(mapping(line.get("evaluation")).get(deciding_metric(run)))
        if value is not None:
            best = best.after(int(line["round"]), value, greater=greater)
    return best


def deciding_metric(run: Run) -> str:
    """What decides which round is best."""
    return str(run.config.get("metric_for_best_model") or "eval_loss").removeprefix("eval_")


# --- for a person ---


def show(look: Look, console: Console) -> None:
    """The state in a few lines, and a table of the clients."""
    for line in (title(look), _state(look), *_facts(look)):
        console.print(line, soft_wrap=True)
    if look.participations:
        console.print(_table(look, console.width))
    left = len(look.participations) - MOST_CLIENTS
    if left > 0:
        console.print(f"and {left:,} more clients; --json has all of them")


_ADAPTER = "adapter_config.json"
_COLOURS = {"running": "cyan", "ended": "green", "stopped": "yellow", "failed": "red"}


def _state(look: Look) -> Text:
    """State, round and time, and how to go on with a run that does not go on."""
    text = Text(look.state, style=f"bold {_COLOURS[look.state]}")
    words = [f"round {look.round} of {look.num_rounds or '?'}"]
    if look.alive:
        words.insert(0, str(look.progress.get("phase") or "at work"))
        words += [f"attempt {look.attempts}"] * (look.attempts > 1)
    words.append(duration(elapsed(look)))
    if (left := time_left(look)) is not None:
        words[-1] += f", {duration(left)} left"
    text.append(f": {', '.join(words)}", style="default not bold")
    if look.problem and look.state == "failed":
        text.append(f"\n{look.problem}", style="default not bold")
    if look.state in ("stopped", "failed"):
        text.append(f"\ngo on with: {resume_command(look)}", style="default not bold")
    return text


def _facts(look: Look) -> list[Text]:
    """Result, best round, bytes, and what is wrong with the files."""
    result, best = result_of(look), best_round(look.run)
    where = "none yet"
    if result:
        of = "" if result.round is None else f" (round {result.round})"
        where = f"{result.path}{of if look.ended else ' (so far)'}"
    facts = [("result", where)]
    if best.round is not None and best.value is not None:
        metric = deciding_metric(look.run)
        value = f"{metric.replace('_', ' ')} {figure(metric, best.value)}"
        name = "the base" if best.round == 0 else f"round {best.round}"
        facts.append(("best", f"{name}, {value}"))
    sizes = traffic(look.bytes_up, look.bytes_down)
    if look.rounds:
        last = look.rounds[-1]
        own = traffic(*(whole(last.get(key)) or 0 for key in ("bytes_up", "bytes_down")))
        sizes += f"; in round {last['round']}: {own}"
    facts.append(("bytes", sizes))
    tried = {line["round"]: whole(line.get("attempts")) or 1 for line in look.rounds}
    if again := [f"round {k} ({n} attempts)" for k, n in tried.items() if n > 1]:
        facts.append(("again", ", ".join(again)))
    lines = [Text.assemble((f"{name:<8}", "dim"), text) for name, text in facts]
    return lines + [Text.assemble(("damaged ", "yellow"), text) for text in look.damage]


def _table(look: Look, width: int) -> Table:
    """A line for each client; names where there are some, reasons as far as there is room."""
    shown = list(look.participations.items())[:MOST_CLIENTS]
    named = any(part.name for _, part in shown)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("client", justify="right")
    if named:
        table.add_column("name", overflow="ellipsis", no_wrap=True, max_width=max(width // 6, 8))
    for name in ("rank", "rows", "rounds", "last", "up", "down"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("left out in round", overflow="fold")
    for client, part in shown:
        cells = [str(client), *([part.name] if named else [])]
        cells += ["-" if x is None else f"{x:,}" for x in (part.rank, part.rows)]
        cells.append(f"{part.counted}/{part.asked}" if part.asked else "-")
        cells.append("-" if part.last_round is None else str(part.last_round))
        cells += [human_bytes(part.bytes_up), human_bytes(part.bytes_down)]
        reason = f"{part.reason_round}: {part.reason}" if part.reason else ""
        table.add_row(*(Text(cell) for cell in cells), Text(reason))
    return table

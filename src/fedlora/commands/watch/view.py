"""Puts a look at a run into so many columns and lines: `fedlora watch`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from rich.console import Group
from rich.text import Text

from fedlora.commands.look import Look
from fedlora.commands.run_files import mapping, number, whole
from fedlora.commands.watch.client_table import counts, left_out, table
from fedlora.commands.watch.figures import bar, duration, elapsed, figure, sparkline, time_left
from fedlora.text import human_bytes


def status(look: Look) -> str:
    """What becomes of the run, in a sentence."""
    if look.ended:
        end = look.run.end
        if not end:
            return "ended"
        best = "" if end.get("best") is None else f"; best: round {end['best']}"
        return f"ended after round {end['round']}{best}; final/ holds round {end.get('final')}"
    if look.alive:
        return str(look.progress.get("phase") or "running")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(look.last_sign))
    why = f" ({look.problem})" if look.problem else ""
    return f"not running since {since}{why}; go on with:\n{resume_command(look)}"


def resume_command(look: Look) -> str:
    """What goes on with a run that does not go on."""
    return f"fedlora run --resume {shlex.quote(str(look.path))}"


def title(look: Look) -> Text:
    """What is run, and where."""
    model = str(look.run.config.get("model_name_or_path") or look.run.begin.get("model") or "?")
    model = Path(model).name if model.startswith(("/", "~")) else model
    text = Text(look.run.method, style="bold")
    text.append(f" · {model} · {look.path}", style="default not bold")
    return text


def traffic(up: int, down: int) -> str:
    """Bytes both ways."""
    return f"up {human_bytes(up)}, down {human_bytes(down)}"


def _evaluations(look: Look, name: str) -> list[tuple[float, float]]:
    lines = (look.run.start, *look.rounds)
    scores = [(x["round"], number(mapping(x.get("evaluation")).get(name))) for x in lines if x]
    return [(float(round), value) for round, value in scores if value is not None]


def _overall(look: Look, width: int) -> Text:
    """Rounds, what is done in this one, and the time."""
    total, finished, left = look.num_rounds, look.finished, time_left(look)
    share = (look.progress.get("share") or 0.0) if look.going_on else 0.0
    done = 1.0 if look.ended else (finished + share) / total if total else 0.0
    text = f"round {look.round} of {total}"
    times = duration(elapsed(look)) + (f", {duration(left)} left" if left is not None else "")
    if look.alive and len(text) + len(times) + 28 <= width:
        text += f", {status(look)}"
    room = min(max(width - len(text) - len(times) - 9, 5), 40)
    return Text(f"{text} ") + bar(done, room) + Text(f" {done:>4.0%}  {times}")


def _series(look: Look, width: int) -> list[Text]:
    """The loss within rounds, and the evaluation over them."""
    metric = str(look.run.config.get("metric_for_best_model") or "loss").removeprefix("eval_")
    losses = [(x, y) for x, y in look.progress.get("losses") or []]
    rows = [("train loss", "loss", losses)]
    for name in dict.fromkeys([metric, "loss"]):
        rows.append((f"eval {name.replace('_', ' ')}", name, _evaluations(look, name)))
    out = []
    for label, name, points in rows:
        if points:
            first, last = (figure(name, points[i][1]) for i in (0, -1))
            line = sparkline(points, min(max(width - 36, 8), 60)) if len(points) > 1 else ""
            ends = (f"{first:>7} ", (line, "cyan"), f" {last}") if line else (f"{last:>7}",)
            out.append(Text.assemble(f"{label:<17.17} ", *ends))
    return out


def _facts(look: Look, width: int) -> list[Text]:
    """The clients of the round that goes on, who was left out of the last, and how often tried."""
    out = []
    if now := counts(look):
        if look.attempts > 1:
            now += f" · attempt {look.attempts}"
        rate = look.progress.get("tokens_per_second")
        if rate and 18 + len(more := f"{now} · {rate:,.0f} tokens/s") <= width:
            now = more
        out.append(Text(f"{'clients':<17} {now}"))
    tried = whole(look.rounds[-1].get("attempts")) or 1 if look.rounds else 1
    again = f"tried {tried} times" if tried > 1 else ""
    if told := "; ".join(filter(None, [again, left_out(look)])):
        out.append(Text(f"{f'in round {look.finished}':<17} {told}"))
    return out


def view(look: Look, width: int, height: int) -> Group:
    """All there is to see, in so many columns and lines."""
    sizes = traffic(look.bytes_up, look.bytes_down)
    total = human_bytes(look.bytes_up + look.bytes_down)
    upper = [
        title(look),
        _overall(look, width),
        *_facts(look, width),
        *_series(look, width),
        Text(f"{'bytes':<17} {sizes}, {total} in all"),
    ]
    warnings = [*look.damage, *(look.progress.get("warnings") or [])[-2:]]
    lower = [Text.assemble(("warning: ", "yellow"), str(text)) for text in warnings]
    end = status(look).split("\n") if not look.alive else []
    used = len(upper) + len(lower) + sum(-(-len(text) // width) for text in end) + 1
    rows = table(look, width, height - used)
    for row in (*upper, *rows, *lower):
        row.truncate(width, overflow="ellipsis")
    # Its command has to stay whole, so that it can be copied.
    wrapped = Text("\n".join(end), style="green" if look.ended else "yellow", overflow="fold")
    return Group(*upper[:2], *([wrapped] if end else []), *upper[2:], Text(""), *rows, *lower)

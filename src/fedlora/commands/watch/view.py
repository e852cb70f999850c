"""Shows a run that goes on elsewhere from the files in its directory: `fedlora watch`."""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError
from fedlora.runs.file_names import CONFIG, FINAL, METRICS
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.progress import HEARTBEAT, read_progress
from fedlora.text import human_bytes

Line = dict[str, Any]
_STALE = 12 * HEARTBEAT  # seconds without a sign of life
_SHARES = ("exact_match", "accuracy", "macro_f1", "token_accuracy")
_STYLES = {"training": "cyan", "done": "green", "rejected": "red", "waiting": "dim", "-": "dim"}


# --- what there is to see ---


@dataclass
class Client:
    """A line of the table of clients; of a round that is over where none goes on."""

    rank: int | None = None
    state: str = "-"
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    before: float | None = None
    up: int = 0
    down: int = 0


def history(lines: Sequence[Line]) -> dict[int, Client]:
    """What the rounds that are saved say about every client."""
    out: dict[int, Client] = {}
    rounds = [line for line in lines if line["event"] == "round"]
    for line in rounds:
        for entry in line["clients"]:
            client, metrics = out.setdefault(entry["client"], Client()), entry["metrics"]
            client.rank = entry["rank"]
            client.before, client.loss = client.loss, metrics.get("loss")
            client.up += entry["bytes_up"]
            client.down += entry["bytes_down"]
            if line is rounds[-1]:
                client.state = "rejected" if entry.get("rejected") else "done"
                client.step = client.steps = int(metrics.get("steps") or 0)
    return out


@dataclass(frozen=True)
class Look:
    """A run as its files show it at one moment.

    Args:
        path: the run's directory, as the user names it.
        config: `config.yaml`.
        lines: `metrics.jsonl`.
        history: what these say about every client.
        progress: `progress.json`; empty in runs of older versions.
        ended: whether the run is complete.
        alive: whether a process works on it.
        now: unix time of the look.
    """

    path: Path
    config: dict[str, Any]
    lines: list[Line]
    history: dict[int, Client]
    progress: dict[str, Any]
    ended: bool
    alive: bool
    now: float

    @property
    def rounds(self) -> list[Line]:
        return [line for line in self.lines if line["event"] == "round"]

    @property
    def finished(self) -> int:
        """The last round that is saved."""
        return max((line["round"] for line in self.rounds), default=0)

    @property
    def num_rounds(self) -> int:
        return int(self.config.get("num_rounds") or self.progress.get("num_rounds") or 0)

    @property
    def last_sign(self) -> float:
        """When something was written last."""
        if "updated" in self.progress:
            return float(self.progress["updated"])
        files = (self.path / METRICS, self.path / CONFIG)
        return max((f.stat().st_mtime for f in files if f.exists()), default=self.now)


class Reader:
    """Looks at a run; `metrics.jsonl` is read again only where it has changed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._seen: tuple[int, int] | None = None
        self._lines: list[Line] = []
        self._history: dict[int, Client] = {}

    def look(self) -> Look | None:
        """The run now; None where there is none yet.

        Raises:
            InputError: there is something else in its place.
        """
        path = self.path
        # A run's directory appears with its configuration in it: what is listed is looked at first.
        holds_files = path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir())
        if not (path / CONFIG).is_file():
            if path.exists() and not path.is_dir():
                raise InputError(f"{path}: a file; give the output directory of a run")
            if holds_files:
                raise InputError(f"{path}: no run; there is no {CONFIG}")
            return None
        try:
            status = (path / METRICS).stat()
        except FileNotFoundError:
            self._seen, self._lines, self._history = None, [], {}
        else:
            if self._seen != (seen := (status.st_mtime_ns, status.st_size)):
                self._seen, self._lines = seen, read_metrics(path)
                self._history = history(self._lines)
        progress = read_progress(path) or {}
        ended = (path / FINAL).is_dir()
        alive = not ended and _alive(path, progress, time.time())
        config = read_yaml(path / CONFIG)
        lines, past = self._lines, self._history
        return Look(path, config, lines, past, progress, ended, alive, time.time())


def _alive(path: Path, progress: dict[str, Any], now: float) -> bool:
    """Whether a process still works on the run; nothing is locked to find out."""
    if progress.get("phase") == "stopped":
        return False
    if not progress:
        return _locked(path) or _just_made(path, now)
    fresh = now - float(progress["updated"]) < _STALE
    if progress.get("host") != socket.gethostname():
        return fresh
    try:
        os.kill(int(progress["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return fresh or _locked(path)


def _just_made(path: Path, now: float) -> bool:
    """Whether the run has its configuration alone, as in the moment before it takes its lock."""
    try:
        return not (path / METRICS).exists() and now - (path / CONFIG).stat().st_mtime < _STALE
    except OSError:
        return False


def _locked(path: Path) -> bool:
    """Whether a process of this host holds the run's lock.

    Taking it for a moment would tell as much, and could make a run that begins just now fail.
    """
    try:
        inode = (path / ".lock").stat().st_ino
        held = Path("/proc/locks").read_text()
    except OSError:
        return False
    return any(f":{inode} " in line and " FLOCK " in line for line in held.splitlines())


# --- figures ---


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(int(max(seconds, 0) + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days} d {text}" if days else text


def time_left(look: Look) -> float | None:
    """Seconds to the end, if all rounds take as long as the last ones; None: cannot be said."""
    progress, remaining = look.progress, look.num_rounds - look.finished
    if not look.alive or remaining < 0:
        return None
    began, share = progress.get("round_began"), progress.get("share") or 0.0
    inside = look.now - began if began and _going_on(look) else 0.0
    each = progress.get("seconds_per_round")
    if each is None and look.rounds:
        last = [sum(line.get("seconds", {}).values()) for line in look.rounds[-5:]]
        each = sum(last) / len(last)
    if each is None:  # the first round: from the part of it that is done
        if share < 0.05 or not inside:
            return None
        each = inside / share
    return max(float(remaining * each - inside), 0.0)


def elapsed(look: Look) -> float:
    """Seconds that the process has worked, or worked."""
    if "started" not in look.progress:
        return float(sum(sum(line.get("seconds", {}).values()) for line in look.rounds))
    end = look.now if look.alive else float(look.progress["updated"])
    return end - float(look.progress["started"])


def sparkline(points: Sequence[tuple[float, float]], width: int) -> str:
    """Values over positions in at most `width` block characters."""
    if not points:
        return ""
    first, last = points[0][0], points[-1][0]
    width = min(width, len(points))
    bins: list[list[float]] = [[] for _ in range(width)]
    for x, y in points:
        where = (x - first) / (last - first) if last > first else 0.0
        bins[min(int(where * width), width - 1)].append(y)
    means = [sum(ys) / len(ys) for ys in bins if ys]
    low, high = min(means), max(means)
    steps = [0.5 if high == low else (y - low) / (high - low) for y in means]
    return "".join("▁▂▃▄▅▆▇█"[min(int(step * 8), 7)] for step in steps)


def figure(name: str, value: float) -> str:
    """A measure as a person reads it: shares in percent."""
    return f"{value:.1%}" if name in _SHARES else f"{value:.4g}"


def _bar(share: float, width: int) -> Text:
    full = round(min(max(share, 0.0), 1.0) * width)
    return Text.assemble(("━" * full, "cyan"), ("─" * (width - full), "dim"))


def _evaluations(look: Look, name: str) -> list[tuple[float, float]]:
    scores = [(x["round"], (x.get("evaluation") or {}).get(name)) for x in look.lines]
    return [(float(number), value) for number, value in scores if value is not None]


# --- clients ---


def clients(look: Look) -> dict[int, Client]:
    """Every client that is known, by number."""
    ranks = look.config.get("client_ranks")
    out = {k: Client(rank) for k, rank in enumerate(ranks if isinstance(ranks, list) else [])}
    if not _going_on(look):
        return dict(sorted((out | look.history).items()))
    for number, c in look.history.items():
        out[number] = Client(c.rank, before=c.loss, up=c.up, down=c.down)
    for number, now in (look.progress.get("clients") or {}).items():
        client = out.setdefault(int(number), Client())
        client.rank, client.state, client.loss = now["rank"], now["state"], now["loss"]
        client.step, client.steps = now["step"], now["steps"]
    return dict(sorted(out.items()))


def _going_on(look: Look) -> bool:
    """Whether a round is at work that is not saved yet."""
    return look.alive and int(look.progress.get("round") or 0) > look.finished


def _rows(look: Look, width: int, height: int) -> list[Text]:
    """The table of clients, in so many lines: all of them, else those that train now."""
    states = clients(look)
    if not states or height < 3:
        return []
    shown = list(states)
    if len(states) > height - 1:
        training = [number for number, client in states.items() if client.state == "training"]
        shown = (training or shown)[: height - 2]
    roomy = width >= 76
    head = f"{'client':>6} {'rank':>4} {'state':<8} {'step':>{18 if roomy else 7}} {'loss':>7}"
    head += f" {'before':>7}" + (f" {'up':>8} {'down':>8}" if roomy else f" {'bytes':>8}")
    rows = [Text(head, style="bold")]
    for number in shown:
        client = states[number]
        row = Text(f"{number:>6} {'-' if client.rank is None else client.rank:>4} ")
        row.append(f"{client.state:<8} ", style=_STYLES.get(client.state, ""))
        steps = f"{client.step}/{client.steps}" if client.steps else "-"
        if roomy:
            row += _bar(client.step / client.steps, 10) if client.steps else Text(" " * 10)
        row.append(f"{steps:>{8 if roomy else 7}}")
        for loss in (client.loss, client.before):
            row.append(f" {'-' if loss is None else format(loss, '.4f'):>7}")
        sizes = (client.up, client.down) if roomy else (client.up + client.down,)
        row.append("".join(f" {human_bytes(size):>8}" for size in sizes))
        rows.append(row)
    if len(shown) < len(states):
        more = f"and {len(states) - len(shown):,} more clients"
        rows.append(Text(f"{'':>6} {'; '.join(filter(None, [more, _counts(look)]))}", style="dim"))
    return rows


def _counts(look: Look) -> str:
    """`4 training, 4 done, 2 waiting of 10`: this round's clients."""
    counts = look.progress.get("counts") or {}
    states = [
        f"{counts[k]:,} {k}" for k in ("training", "done", "rejected", "waiting") if counts.get(k)
    ]
    if not states or not _going_on(look):
        return ""
    return f"{', '.join(states)} of {counts['selected']:,}"


# --- the view ---


def status(look: Look) -> str:
    """What becomes of the run, in a sentence."""
    if look.ended:
        end = next((line for line in look.lines if line["event"] == "end"), None)
        if end is None:
            return "ended"
        best = "" if end.get("best") is None else f"; best: round {end['best']}"
        return f"ended after round {end['round']}{best}; final/ holds round {end['final']}"
    if look.alive:
        return str(look.progress.get("phase") or "running")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(look.last_sign))
    problem = look.progress.get("problem")
    why = f" ({problem})" if problem and look.progress.get("phase") == "stopped" else ""
    resume = f"fedlora run --resume {shlex.quote(str(look.path))}"
    return f"not running since {since}{why}; go on with:\n{resume}"


def _title(look: Look) -> Text:
    model = str(look.config.get("model_name_or_path") or "?")
    model = Path(model).name if model.startswith(("/", "~")) else model
    text = Text(f"{look.config.get('method', '?')}", style="bold")
    text.append(f" · {model} · {look.path}", style="default not bold")
    return text


def _overall(look: Look, width: int) -> Text:
    """Rounds, what is done in this one, and the time."""
    total, finished, left = look.num_rounds, look.finished, time_left(look)
    going_on = _going_on(look)
    share = (look.progress.get("share") or 0.0) if going_on else 0.0
    done = 1.0 if look.ended else (finished + share) / total if total else 0.0
    text = f"round {finished + going_on} of {total}"
    times = duration(elapsed(look)) + (f", {duration(left)} left" if left is not None else "")
    if look.alive and len(text) + len(times) + 28 <= width:
        text += f", {status(look)}"
    room = min(max(width - len(text) - len(times) - 9, 5), 40)
    return Text(f"{text} ") + _bar(done, room) + Text(f" {done:>4.0%}  {times}")


def _series(look: Look, width: int) -> list[Text]:
    """The loss within rounds, and the evaluation over them."""
    metric = str(look.config.get("metric_for_best_model") or "loss").removeprefix("eval_")
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


def view(look: Look, width: int, height: int) -> Group:
    """All there is to see, in so many columns and lines."""
    rate, counts = look.progress.get("tokens_per_second"), _counts(look)
    up, down = (sum(line[key] for line in look.rounds) for key in ("bytes_up", "bytes_down"))
    sizes = f"up {human_bytes(up)}, down {human_bytes(down)}, {human_bytes(up + down)} in all"
    facts = f"{'clients':<17} {counts}" if counts else ""
    if rate and facts and len(more := f"{facts} · {rate:,.0f} tokens/s") <= width:
        facts = more
    upper = [_title(look), _overall(look, width)]
    if facts:
        upper.append(Text(facts))
    upper += _series(look, width)
    upper.append(Text(f"{'bytes':<17} {sizes}"))
    warnings = (look.progress.get("warnings") or [])[-2:]
    lower = [Text.assemble(("warning: ", "yellow"), str(text)) for text in warnings]
    end = status(look).split("\n") if not look.alive else []
    used = len(upper) + len(lower) + sum(-(-len(text) // width) for text in end) + 1
    rows = _rows(look, width, height - used)
    for row in (*upper, *rows, *lower):
        row.truncate(width, overflow="ellipsis")
    # Its command has to stay whole, so that it can be copied.
    wrapped = Text("\n".join(end), style="green" if look.ended else "yellow", overflow="fold")
    return Group(*upper[:2], *([wrapped] if end else []), *upper[2:], Text(""), *rows, *lower)

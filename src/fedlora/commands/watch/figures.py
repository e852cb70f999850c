"""Puts figures of a run as a person reads them: times, shares, series in block characters."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from fedlora.commands.look import Look
from fedlora.commands.run_files import Line, mapping, number

_SHARES = ("exact_match", "accuracy", "macro_f1", "token_accuracy")


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(int(max(seconds, 0) + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days} d {text}" if days else text


def seconds_of(line: Line) -> float:
    """Seconds that a round took."""
    return float(sum(number(x) or 0.0 for x in mapping(line.get("seconds")).values()))


def time_left(look: Look) -> float | None:
    """Seconds to the end, if all rounds take as long as the last ones; None: cannot be said."""
    progress, remaining = look.progress, look.num_rounds - look.finished
    if not look.alive or remaining < 0:
        return None
    began, share = progress.get("round_began"), progress.get("share") or 0.0
    inside = look.now - began if began and look.going_on else 0.0
    each = progress.get("seconds_per_round")
    if each is None and look.rounds:
        last = [seconds_of(line) for line in look.rounds[-5:]]
        each = sum(last) / len(last)
    if each is None:  # the first round: from the part of it that is done
        if share < 0.05 or not inside:
            return None
        each = inside / share
    return max(float(remaining * each - inside), 0.0)


def elapsed(look: Look) -> float:
    """Seconds that the process has worked, or worked."""
    if "started" not in look.progress:
        return sum(map(seconds_of, look.rounds))
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


def bar(share: float, width: int) -> Text:
    """A share as a bar of so many characters."""
    full = round(min(max(share, 0.0), 1.0) * width)
    return Text.assemble(("━" * full, "cyan"), ("─" * (width - full), "dim"))

"""Shows the clients of a run: what each does now, and its part in the rounds before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from fedlora.commands.look import Look, Participation
from fedlora.commands.run_files import mapping, whole
from fedlora.commands.watch.figures import bar
from fedlora.runs.progress import STATES
from fedlora.text import human_bytes

_STYLES = {
    "training": "cyan",
    "done": "green",
    "rejected": "red",
    "late": "red",
    "unneeded": "dim",
    "waiting": "dim",
    "-": "dim",
}


@dataclass(frozen=True)
class Client:
    """A line of the table; of the last round where none goes on.

    Args:
        rank: of its adapter.
        state: waiting, training, done, rejected, late or unneeded; -: it is not asked.
        step: it has made in this round.
        steps: it makes in this round; None: not known yet.
        loss: of the last step, or of its newest training.
        before: the loss of the training before.
        up: bytes it has sent in all rounds.
        down: bytes it was sent in all rounds.
        asked: saved rounds that asked it.
        counted: saved rounds in which its update counts.
        reason: why it did not count in the newest round that it did not count in; "" for none.
    """

    rank: int | None
    state: str = "-"
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    before: float | None = None
    up: int = 0
    down: int = 0
    asked: int = 0
    counted: int = 0
    reason: str = ""


def clients(look: Look) -> dict[int, Client]:
    """Every client that is known, by number."""
    now = mapping(look.progress.get("clients")) if look.going_on else {}
    numbers = {*look.participations, *(int(number) for number in now if number.isdigit())}
    return {
        number: _client(
            look.participations.get(number, Participation()),
            mapping(now.get(str(number))) if look.going_on else None,
        )
        for number in sorted(numbers)
    }


def _client(part: Participation, now: Mapping[str, Any] | None) -> Client:
    """A client's line.

    Args:
        part: its part in the rounds that are saved.
        now: what it does in the round that goes on, empty where that does not ask it or does not
            list it; None where no round goes on.
    """
    known: dict[str, Any] = {
        "up": part.bytes_up,
        "down": part.bytes_down,
        "asked": part.asked,
        "counted": part.counted,
        "reason": part.reason,
    }
    if now is None:
        state = STATES.get(part.outcome or "", "-")
        steps = part.steps if state != "-" else 0
        return Client(part.rank, state, steps, steps, part.loss, part.loss_before, **known)
    return Client(
        whole(now.get("rank")) or part.rank,
        str(now.get("state") or "-"),
        whole(now.get("step")) or 0,
        whole(now.get("steps")),
        now.get("loss"),
        part.loss,
        **known,
    )


def counts(look: Look) -> str:
    """`4 training, 4 done, 2 waiting of 10`: the clients of the round that goes on."""
    numbers = mapping(look.progress.get("counts"))
    words = ("training", "done", "rejected", "late", "unneeded", "waiting")
    states = [f"{numbers[word]:,} {word}" for word in words if numbers.get(word)]
    if not states or not look.going_on:
        return ""
    return f"{', '.join(states)} of {numbers['selected']:,}"


def left_out(look: Look) -> str:
    """Who was asked in the last saved round and does not count, and why; "" where all count."""
    last = look.finished
    absent = {
        number: part
        for number, part in look.participations.items()
        if last and part.reason_round == last and part.outcome != "counted"
    }
    reasons: dict[str, list[str]] = {}
    for number, part in absent.items():
        reasons.setdefault(part.reason, []).append(str(number))
    if not reasons:
        return ""
    told = [
        f"client{'s' * (len(numbers) > 1)} {' '.join(numbers)}: {reason}"
        for reason, numbers in reasons.items()
    ]
    return "; ".join(told)


def table(look: Look, width: int, height: int) -> list[Text]:
    """The table of clients, in so many lines: all of them, else those that train now."""
    states = clients(look)
    if not states or height < 3:
        return []
    shown = list(states)
    if len(states) > height - 1:
        training = [number for number, client in states.items() if client.state == "training"]
        shown = (training or shown)[: height - 2]
    roomy = width >= 80
    head = f"{'client':>6} {'rank':>4} {'state':<8} {'step':>{18 if roomy else 7}} {'loss':>7}"
    head += f" {'before':>7}" + (f" {'up':>8} {'down':>8}" if roomy else f" {'bytes':>8}")
    rows = [Text(f"{head} {'rounds':>6}", style="bold")]
    rows += [_row(number, states[number], roomy) for number in shown]
    if len(shown) < len(states):
        more = f"and {len(states) - len(shown):,} more clients"
        rows.append(Text(f"{'':>6} {'; '.join(filter(None, [more, counts(look)]))}", style="dim"))
    return rows


def _row(number: int, client: Client, roomy: bool) -> Text:
    """A client's line, with a bar and its bytes each way where there is room."""
    row = Text(f"{number:>6} {'-' if client.rank is None else client.rank:>4} ")
    row.append(f"{client.state:<8} ", style=_STYLES.get(client.state, ""))
    steps = f"{client.step}/{client.steps}" if client.steps else "-"
    if roomy:
        row += bar(client.step / client.steps, 10) if client.steps else Text(" " * 10)
    row.append(f"{steps:>{8 if roomy else 7}}")
    for loss in (client.loss, client.before):
        row.append(f" {'-' if loss is None else format(loss, '.4f'):>7}")
    sizes = (client.up, client.down) if roomy else (client.up + client.down,)
    row.append("".join(f" {human_bytes(size):>8}" for size in sizes))
    rounds = f"{client.counted}/{client.asked}" if client.asked else "-"
    row.append(f" {rounds:>6}")
    return row

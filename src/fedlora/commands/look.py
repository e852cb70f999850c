"""Looks at a run from outside: what its files say at one moment, and whether it still goes on.

Nothing is locked, written or changed, so that a look neither slows a run down nor stops it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedlora.commands.run_files import (
    Line,
    Run,
    bytes_of,
    is_run,
    listed,
    mapping,
    number,
    outcome_of,
    read_run,
    whole,
)
from fedlora.errors import InputError
from fedlora.runs.file_names import CONFIG, FINAL, LOCK, METRICS
from fedlora.runs.progress import HEARTBEAT, PROGRESS, read_progress

_STALE = 12 * HEARTBEAT  # seconds without a sign of life

State = Literal["running", "ended", "stopped", "failed"]
"""What has become of a run: a process works on it; it is complete; it was interrupted or killed, or
its process has come to an error, and it can be resumed."""


@dataclass
class Participation:
    """A client's part in the rounds that are saved.

    Args:
        rank: of its adapter, as it was last.
        name: what it is called, or "".
        rows: to train on; None where no line says it.
        asked: rounds that asked it.
        counted: rounds in which its update counts.
        last_round: the newest of these; None: there is none.
        outcome: what became of it in the last round: `counted`, `failed`, `late`, `unneeded` or
            `not_sampled`; None before the first.
        reason: why it did not count in the newest round that it did not count in; "" for none.
        reason_round: that round.
        loss: of its newest training.
        loss_before: of the one before.
        steps: of its training in the last round.
        bytes_up: it has sent.
        bytes_down: it was sent.
    """

    rank: int | None = None
    name: str = ""
    rows: int | None = None
    asked: int = 0
    counted: int = 0
    last_round: int | None = None
    outcome: str | None = None
    reason: str = ""
    reason_round: int | None = None
    loss: float | None = None
    loss_before: float | None = None
    steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


def participations(run: Run) -> dict[int, Participation]:
    """Every client that is known, by number, and its part in the rounds that are saved."""
    out: dict[int, Participation] = {}
    ranks = run.config.get("client_ranks")
    for index, rank in enumerate(ranks if isinstance(ranks, list) else []):
        out[index] = Participation(whole(rank))
    for entry in listed(run.begin.get("clients")):
        if (client := whole(entry.get("client"))) is not None:
            name, rows = str(entry.get("name") or ""), whole(entry.get("rows"))
            out[client] = Participation(whole(entry.get("rank")), name, rows)
    for line in run.rounds:
        asked = set()
        for entry in listed(line.get("clients")):
            if (client := whole(entry.get("client"))) is not None:
                asked.add(client)
                _add(out.setdefault(client, Participation()), int(line["round"]), entry)
        for client, part in out.items():
            if client not in asked:
                part.outcome, part.steps = "not_sampled", 0
    return dict(sorted(out.items()))


def _add(part: Participation, round: int, entry: Line) -> None:
    """Take a round into a client's account."""
    metrics = mapping(entry.get("metrics"))
    part.rank = whole(entry.get("rank")) or part.rank
    if part.rows is None:
        part.rows = whole(entry.get("num_examples"))
    part.asked += 1
    part.outcome = outcome_of(entry)
    part.steps = whole(metrics.get("steps")) or 0
    if part.outcome == "counted":
        part.counted, part.last_round = part.counted + 1, round
    else:
        part.reason, part.reason_round = str(entry.get("rejected") or part.outcome), round
    if (loss := number(metrics.get("loss"))) is not None:
        part.loss_before, part.loss = part.loss, loss
    part.bytes_up += whole(entry.get("bytes_up")) or 0
    part.bytes_down += whole(entry.get("bytes_down")) or 0


@dataclass(frozen=True)
class Look:
    """A run as its files show it at one moment.

    Args:
        run: what it has written.
        participations: every client's part in the rounds that are saved, by number.
        progress: `progress.json`; empty in runs of older versions, or where it is damaged.
        ended: whether the run is complete.
        alive: whether a process works on it.
        now: unix time of the look.
    """

    run: Run
    participations: dict[int, Participation]
    progress: dict[str, Any]
    ended: bool
    alive: bool
    now: float

    @property
    def path(self) -> Path:
        """The run's directory, as the user names it."""
        return self.run.path

    @property
    def rounds(self) -> tuple[Line, ...]:
        """The lines of the rounds that are saved, ascending."""
        return self.run.rounds

    @property
    def finished(self) -> int:
        """The last round that is saved."""
        return self.run.last_round

    @property
    def num_rounds(self) -> int:
        """How many rounds there will be; 0 where it is not known."""
        return self.run.planned or whole(self.progress.get("num_rounds")) or 0

    @property
    def going_on(self) -> bool:
        """Whether a round is at work that is not saved yet."""
        return self.alive and (whole(self.progress.get("round")) or 0) > self.finished

    @property
    def round(self) -> int:
        """The round that goes on, or else the last that is saved."""
        return int(self.progress["round"]) if self.going_on else self.finished

    @property
    def attempts(self) -> int:
        """How often this round is being, or was, tried."""
        lines = self.rounds[-1:]
        said = self.progress.get("attempt") if self.going_on else None
        return whole(said) or (whole(lines[0].get("attempts")) if lines else None) or 1

    @property
    def problem(self) -> str:
        """Why its process came to no end, in words; "" where that is not known."""
        stopped = self.progress.get("phase") == "stopped"
        return str(self.progress.get("problem") or "") if stopped else ""

    @property
    def state(self) -> State:
        """What has become of the run."""
        if self.ended:
            return "ended"
        if self.alive:
            return "running"
        return "failed" if self.problem not in ("", "interrupted") else "stopped"

    @property
    def last_sign(self) -> float:
        """When something was written last, as unix time."""
        if self.progress:
            return float(self.progress["updated"])
        files = (self.path / METRICS, self.path / CONFIG)
        return max((f.stat().st_mtime for f in files if f.exists()), default=self.now)

    @property
    def damage(self) -> tuple[str, ...]:
        """What is wrong with its files; that lines are still to be written is not."""
        unwritten = self.alive or not (self.path / METRICS).exists()
        return tuple(x for x in self.run.damage if not (unwritten and x.startswith(METRICS)))

    @property
    def bytes_up(self) -> int:
        """All bytes that clients have sent, in attempts that were given up too."""
        return sum(bytes_of(line)[0] for line in self.rounds)

    @property
    def bytes_down(self) -> int:
        """All bytes that clients were sent, to evaluate and in attempts that were given up too."""
        return sum(bytes_of(line)[1] for line in (self.run.start, *self.rounds))


class Reader:
    """Looks at a run; its lines are read again only where they have changed.

    Args:
        path: the run's directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._seen: Sequence[Any] = ()
        self._run: Run | None = None
        self._participations: dict[int, Participation] = {}

    def look(self) -> Look | None:
        """The run now; None where there is none yet.

        Raises:
            InputError: there is something else in its place.
        """
        path = self.path
        # A run's directory appears with its configuration in it: what is listed is looked at first.
        try:
            holds_files = path.is_dir() and any(x.name[0] != "." for x in path.iterdir())
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        if not is_run(path):
            if path.exists() and not path.is_dir():
                raise InputError(f"{path}: a file; give the output directory of a run")
            if holds_files:
                raise InputError(f"{path}: no run; there is no {CONFIG}")
            return None
        seen = [_version(path / name) for name in (CONFIG, METRICS)]
        if self._run is None or seen != self._seen:
            self._seen, self._run = seen, read_run(path)
            self._participations = participations(self._run)
        progress, now = _sound_progress(path), time.time()
        ended = (path / FINAL).is_dir()
        alive = not ended and _alive(path, progress, now)
        return Look(self._run, self._participations, progress, ended, alive, now)


def _version(file: Path) -> tuple[int, int] | None:
    """What changes whenever a file is written; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _sound_progress(path: Path) -> dict[str, Any]:
    """The snapshot of a run; empty where there is none, or one that lacks what all have."""
    progress = read_progress(path) or {}
    needed = (progress.get(key) for key in ("started", "updated", "pid"))
    return progress if all(number(x) is not None for x in needed) else {}


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
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return fresh or _locked(path)


def _just_made(path: Path, now: float) -> bool:
    """Whether the run has its configuration alone, as in the moment before it takes its lock."""
    try:
        alone = not (path / METRICS).exists() and not (path / PROGRESS).exists()
        return alone and now - (path / CONFIG).stat().st_mtime < _STALE
    except OSError:
        return False


def _locked(path: Path) -> bool:
    """Whether a process of this host holds the run's lock.

    Taking it for a moment would tell as much, and could make a run that begins just now fail.
    """
    try:
        inode = (path / LOCK).stat().st_ino
        held = Path("/proc/locks").read_text()
    except OSError:
        return False
    return any(f":{inode} " in line and " FLOCK " in line for line in held.splitlines())

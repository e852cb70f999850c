"""Writes `progress.json`, which tells whoever looks what is going on in a run now.

    pid, host          the process that writes, and where it runs
    started, updated   unix time; `updated` goes on every few seconds while the process lives
    phase              loading, training, aggregating, evaluating, ended or stopped
    problem            why it stopped; null otherwise
    round, num_rounds  the round that goes on (0: none yet) and how many there will be
    finished           rounds that are saved
    round_began        unix time; null before the first round
    seconds_per_round  mean of the last rounds; null before one has ended
    share              part of the round's local training that is done, from 0 to 1
    tokens_per_second  in this round; null where nothing has been trained
    attempt            how often this round is tried now, counted from 1
    counts             clients of this round: selected, waiting, training, done, rejected, late,
                       unneeded
    clients            {client: {rank, state, step, steps, loss}}; in a round of many clients only
                       those that train now
    losses             [[position in rounds, mean loss of a step over the clients], ...], thinned
    warnings           the last of them

A snapshot, replaced as a whole about once a second. Nothing depends on it: it is not forced to the
disk, and where it cannot be written the run goes on without it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.runs.events import Event

PROGRESS = "progress.json"
STATES = {"counted": "done", "failed": "rejected", "late": "late", "unneeded": "unneeded"}
"""What became of a client (`ClientRecord.outcome`) -> its state here."""
HEARTBEAT = 5.0
"""Seconds after which it is written though nothing happened: a step can take minutes."""
_LISTED = 128  # clients of a round that are listed one by one
_BUCKETS, _POINTS = 40, 240  # of the series of losses: in a round, in all
_Point = list[float]  # position in rounds, loss


def read_progress(run: str | Path) -> dict[str, Any] | None:
    """The snapshot in a run's directory; None where there is none, or none that can be read."""
    try:
        snapshot = json.loads((Path(run) / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return snapshot if isinstance(snapshot, dict) else None


@dataclass
class _Losses:
    """Mean loss of a step over the clients, by position in rounds; thinner the longer it gets."""

    points: list[_Point] = field(default_factory=list)
    sums: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)] * _BUCKETS)

    def add(self, step: int, steps: int, loss: float) -> None:
        bucket = min((step - 1) * _BUCKETS // max(steps, 1), _BUCKETS - 1)
        total, count = self.sums[bucket]
        self.sums[bucket] = (total + loss, count + 1)

    def of_round(self, finished: int) -> list[_Point]:
        return [
            [round(finished + (i + 1) / _BUCKETS, 4), round(total / count, 5)]
            for i, (total, count) in enumerate(self.sums)
            if count
        ]

    def next_round(self, finished: int) -> None:
        """Close a round: `finished` are those before it."""
        self.points += self.of_round(finished)
        self.sums = [(0.0, 0)] * _BUCKETS
        while len(self.points) > _POINTS:  # neighbours become one
            one, other = self.points[::2], self.points[1::2]
            pairs = zip(one, other, strict=False)
            tail = one[len(other) :]
            self.points = [[(x + u) / 2, (y + v) / 2] for (x, y), (u, v) in pairs] + tail


class Progress:
    """Keeps `progress.json` up to date; a function of the events a run reports.

    Events change what is in memory alone; a thread writes it down.

    Args:
        output_dir: the run's directory.
        interval: seconds between two writes.
    """

    def __init__(self, output_dir: str | Path, interval: float = 1.0) -> None:
        self.path, self.interval = Path(output_dir) / PROGRESS, interval
        self._before = read_progress(output_dir) or {}  # of a run that is resumed
        self._facts: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.time(),
            "phase": "loading",
            "problem": None,
            "round": 0,
            "num_rounds": None,
            "finished": 0,
            "round_began": None,
            "attempt": 1,
        }
        self._seconds: deque[float] = deque(maxlen=5)
        self._warnings: deque[str] = deque(maxlen=5)
        self._ranks: list[int] = []
        self._clients: dict[int, dict[str, Any]] = {}
        self._training: set[int] = set()
        self._selected = self._tokens = 0
        self._ended = Counter[str]()  # state -> clients of this round that ended so
        self._last_step = 0.0
        self._losses = _Losses()
        self._handlers: dict[str, Callable[[Event], None]] = {
            "step": self._on_step,
            "begin": self._on_begin,
            "warning": self._on_warning,
            "round_begin": self._on_round_begin,
            "client_begin": self._on_client_begin,
            "client_end": self._on_client_end,
            "evaluate_begin": self._on_evaluate_begin,
            "round": self._on_round,
            "end": self._on_end,
        }
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._changed = self._heard = False
        self._write()
        self._thread = threading.Thread(target=self._keep_writing, name="progress", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        if (handler := self._handlers.get(event["event"])) is not None:
            with self._lock:
                handler(event)
                self._changed = self._heard = True

    def close(self, problem: str | None = None) -> None:
        """Write how it ended, and stop writing.

        Args:
            problem: why it did not come to its end.
        """
        self._closing.set()
        self._thread.join()
        if self._facts["phase"] != "ended" or problem is not None:
            self._facts |= {"phase": "stopped", "problem": problem}
        self._write()

    # --- events ---

    def _on_begin(self, event: Event) -> None:
        finished = event.get("resumed_from") or 0
        ranks = event.get("ranks") or [c["rank"] for c in event.get("clients") or []]
        self._facts |= {"num_rounds": event["num_rounds"], "finished": finished, "round": finished}
        self._ranks = list(ranks)
        known = self._before.get("losses") or []
        self._losses.points = [list(point) for point in known if point[0] <= finished]

    def _on_warning(self, event: Event) -> None:
        self._warnings.append(str(event["message"])[:500])

    def _on_round_begin(self, event: Event) -> None:
        chosen = list(event["clients"])
        self._facts |= {"phase": "training", "round": event["round"], "round_began": time.time()}
        self._facts["attempt"] = event.get("attempt", 1)
        self._selected, self._tokens = len(chosen), 0
        self._ended.clear()
        self._training = set()
        self._clients = {}
        if len(chosen) <= _LISTED:
            self._clients = {client: self._client(client, "waiting") for client in chosen}

    def _client(self, client: int, state: str, rank: int | None = None) -> dict[str, Any]:
        if rank is None and client < len(self._ranks):
            rank = self._ranks[client]
        return {"rank": rank, "state": state, "step": 0, "steps": None, "loss": None}

    def _on_client_begin(self, event: Event) -> None:
        client = event["client"]
        self._training.add(client)
        self._clients[client] = self._client(client, "training", event["rank"])

    def _on_step(self, event: Event) -> None:
        step, steps, loss = event["step"], event["steps"], event["loss"]
        client = self._clients.get(event["client"])
        if client is not None:
            client["step"], client["steps"], client["loss"] = step, steps, loss
        if loss is not None and math.isfinite(loss):
            self._losses.add(step, steps, loss)
        self._tokens += event["tokens"]
        self._last_step = time.time()

    def _on_client_end(self, event: Event) -> None:
        client, state = event["client"], STATES[event["outcome"]]
        self._training.discard(client)
        self._ended[state] += 1
        if self._selected > _LISTED:
            self._clients.pop(client, None)
        elif client in self._clients:
            self._clients[client]["state"] = state
        if self._ended.total() == self._selected:
            self._facts["phase"] = "aggregating"

    def _on_evaluate_begin(self, event: Event) -> None:
        self._facts["phase"] = "evaluating"

    def _on_round(self, event: Event) -> None:
        number = event["round"]
        self._losses.next_round(number - 1)
        self._facts["finished"] = max(number, self._facts["finished"])
        if self._facts["round_began"] is not None:
            self._seconds.append(time.time() - self._facts["round_began"])

    def _on_end(self, event: Event) -> None:
        self._facts["phase"] = "ended"

    # --- writing ---

    def _keep_writing(self) -> None:
        since = 0.0
        while not self._closing.wait(self.interval):
            since += self.interval
            if self._changed or since >= HEARTBEAT:
                since = 0.0
                self._write()

    def _write(self) -> None:
        with self._lock:
            if self._before and not self._heard:
                return  # a resume that is refused leaves what it finds
            self._changed = False
            snapshot = self._snapshot()
        partial = self.path.with_name(f".{PROGRESS}.partial")
        try:
            partial.write_text(json.dumps(snapshot) + "\n", encoding="utf-8")
            os.replace(partial, self.path)
        except OSError:  # a full disk is the run's to report, and half a file must not fill it
            with contextlib.suppress(OSError):
                partial.unlink()

    def _snapshot(self) -> dict[str, Any]:
        facts, count, ended = self._facts, self._selected, self._ended.total()
        listed = list(self._clients.items())[:_LISTED]
        running = [self._clients[client] for client in self._training]
        part = sum(c["step"] / c["steps"] for c in running if c["steps"])
        going_on = facts["round"] > facts["finished"]
        rate = None
        if self._tokens and self._last_step > facts["round_began"]:
            rate = self._tokens / (self._last_step - facts["round_began"])
        return {
            **facts,
            "updated": time.time(),
            "seconds_per_round": sum(self._seconds) / len(self._seconds) if self._seconds else None,
            "share": min((ended + part) / count, 1.0) if count and going_on else 0.0,
            "tokens_per_second": rate,
            "counts": {
                "selected": count,
                "waiting": max(count - ended - len(self._training), 0),
                "training": len(self._training),
                **{state: self._ended[state] for state in STATES.values()},
            },
            "clients": {str(client): dict(found) for client, found in listed},
            "losses": self._losses.points
            + (self._losses.of_round(facts["finished"]) if going_on else []),
            "warnings": list(self._warnings),
        }

"""`progress.json`: what it says at every moment, and how often it is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from threading import Lock, Semaphore, Thread
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.runs import progress as module
from fedlora.runs.progress import PROGRESS, Progress, read_progress

Event = dict[str, Any]


def begin(clients: int = 3, resumed_from: int | None = None) -> Event:
    ranks = [8, 4, 2, *[1] * (clients - 3)]
    return {"event": "begin", "num_rounds": 4, "ranks": ranks, "resumed_from": resumed_from}


def step(client: int, number: int, loss: float | None = 2.0, steps: int = 4) -> Event:
    return {
        "event": "step",
        "client": client,
        "step": number,
        "steps": steps,
        "loss": loss,
        "tokens": 100,
    }


def round_begin(number: int, clients: int = 3) -> Event:
    return {"event": "round_begin", "round": number, "clients": list(range(clients))}


def client_begin(client: int, rank: int = 8) -> Event:
    return {"event": "client_begin", "client": client, "rank": rank}


def client_end(client: int, outcome: str = "counted") -> Event:
    return {"event": "client_end", "client": client, "metrics": {}, "outcome": outcome}


def now(progress: Progress) -> dict[str, Any]:
    """What would be written at this moment."""
    progress._write()
    found = read_progress(progress.path.parent)
    assert found is not None
    return found


def told(progress: Progress, *events: Event) -> dict[str, Any]:
    for event in events:
        progress(event)
    return now(progress)


def test_a_run(tmp_path: Path) -> None:
    show = Progress(tmp_path, interval=60)
    first = read_progress(tmp_path)
    assert first is not None  # at once: the process can be seen while it loads
    assert (first["phase"], first["pid"], first["finished"]) == ("loading", os.getpid(), 0)
    found = told(show, begin(), {"event": "evaluate_begin"})
    assert (found["phase"], found["round"], found["num_rounds"]) == ("evaluating", 0, 4)

    found = told(show, {"event": "start", "round": 0}, round_begin(1), client_begin(0))
    assert (found["phase"], found["round"], found["share"]) == ("training", 1, 0)
    assert found["clients"]["0"]["state"] == "training"
    assert found["clients"]["1"] == {
        "rank": 4,
        "state": "waiting",
        "step": 0,
        "steps": None,
        "loss": None,
    }
    found = told(show, step(0, 1, 3.0), step(0, 2, 1.0))
    assert found["clients"]["0"]["loss"] == 1.0
    assert found["share"] == pytest.approx(0.5 / 3)
    assert found["tokens_per_second"] > 0
    assert found["losses"] == [[0.025, 3.0], [0.275, 1.0]]
    found = told(show, client_end(0), client_begin(1, 4), step(1, 1, 2.0))
    assert found["counts"] == {
        "selected": 3,
        "waiting": 1,
        "training": 1,
        "done": 1,
        "rejected": 0,
        "late": 0,
        "unneeded": 0,
    }
    assert found["losses"][0] == [0.025, 2.5]  # the mean over the clients
    found = told(show, client_end(1, "failed"), client_begin(2), client_end(2))
    assert (found["phase"], found["share"]) == ("aggregating", 1)
    states = {k: client["state"] for k, client in found["clients"].items()}
    assert states == {"0": "done", "1": "rejected", "2": "done"}
    assert found["counts"]["rejected"] == 1

    found = told(show, {"event": "evaluate_begin"}, {"event": "round", "round": 1})
    assert (found["phase"], found["finished"], found["share"]) == ("evaluating", 1, 0)
    assert found["seconds_per_round"] > 0
    show({"event": "warning", "message": "x" * 1000})
    show({"event": "end", "round": 1})
    show.close()
    last = read_progress(tmp_path)
    assert last is not None
    assert (last["phase"], last["problem"]) == ("ended", None)
    assert last["warnings"] == ["x" * 500]
    assert last["losses"] == [[0.025, 2.5], [0.275, 1.0]]
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS]


def test_a_round_that_is_tried_again(tmp_path: Path) -> None:
    show = Progress(tmp_path, interval=60)
    ends = [client_end(0), client_end(1, "late"), client_end(2, "unneeded")]
    found = told(show, begin(), round_begin(1), *ends)
    assert (found["attempt"], found["phase"]) == (1, "aggregating")
    states = {k: client["state"] for k, client in found["clients"].items()}
    assert states == {"0": "done", "1": "late", "2": "unneeded"}
    assert [found["counts"][k] for k in ("done", "rejected", "late", "unneeded")] == [1, 0, 1, 1]
    found = told(show, {**round_begin(1), "attempt": 2})
    assert (found["attempt"], found["phase"], found["share"]) == (2, "training", 0)
    assert found["counts"]["waiting"] == 3
    show.close()


def test_stopped(tmp_path: Path) -> None:
    show = Progress(tmp_path)
    show(begin())
    show.close("interrupted")
    found = read_progress(tmp_path)
    assert found is not None
    assert (found["phase"], found["problem"]) == ("stopped", "interrupted")


def test_a_failure_after_the_last_event(tmp_path: Path) -> None:
    """`final/` is written after it."""
    show = Progress(tmp_path)
    show({"event": "end", "round": 4})
    show.close("no space left")
    found = read_progress(tmp_path)
    assert found is not None
    assert found["phase"] == "stopped"


def test_resumed(tmp_path: Path) -> None:
    show = Progress(tmp_path)
    show(begin())
    for number in (1, 2):
        for event in (round_begin(number), client_begin(0), step(0, 4, float(number))):
            show(event)
        show({"event": "round", "round": number})
    show.close("interrupted")
    again = Progress(tmp_path)
    found = told(again, begin(resumed_from=1), round_begin(2), client_begin(0), step(0, 1, 7.0))
    assert found["finished"] == 1
    assert found["losses"] == [[0.775, 1.0], [1.025, 7.0]]
    again.close()


def test_a_loss_that_is_none(tmp_path: Path) -> None:
    show = Progress(tmp_path)
    events = (step(0, 1, None), step(0, 2, float("nan")))
    found = told(show, begin(), round_begin(1), client_begin(0), *events)
    show.close()
    assert found["losses"] == []


class Turns:
    """Stands for the event a writer waits for between two writes: the test says when it goes on."""

    def __init__(self) -> None:
        self.waited: list[float] = []
        self._go, self._done, self._closing = Semaphore(0), Semaphore(0), False

    def wait(self, seconds: float) -> bool:
        if self.waited:
            self._done.release()
        self.waited.append(seconds)
        self._go.acquire()
        return self._closing

    def set(self) -> None:
        self._closing = True
        self._go.release()

    def next(self) -> None:
        """Let the writer wake once, and wait until it waits again."""
        self._go.release()
        assert self._done.acquire(timeout=60)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    made = Turns()
    own = SimpleNamespace(Lock=Lock, Thread=Thread, Event=lambda: made)
    monkeypatch.setattr(module, "threading", own)
    return made


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the file is replaced."""
    replace, made = os.replace, list[int]()

    def counted(*names: Any) -> None:
        made.append(1)
        replace(*names)

    monkeypatch.setattr(module.os, "replace", counted)
    return made


def test_it_is_written_once_in_an_interval(tmp_path: Path, turns: Turns, writes: list[int]) -> None:
    """However many events there are; and not at all where there are none."""
    show = Progress(tmp_path, interval=0.5)
    assert len(writes) == 1
    for event in (begin(), round_begin(1), client_begin(0)):
        show(event)
    for number in range(1000):
        show(step(0, number + 1, 2.0, 10**9))
    assert len(writes) == 1  # an event changes what is in memory alone
    turns.next()
    assert len(writes) == 2
    turns.next()
    assert len(writes) == 2
    show.close()
    assert len(writes) == 3
    assert set(turns.waited) == {0.5}


def test_it_shows_that_the_process_lives(
    tmp_path: Path, turns: Turns, writes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step can take minutes."""
    monkeypatch.setattr(module, "HEARTBEAT", 3.0)
    show = Progress(tmp_path, interval=1.0)
    before = len(writes)
    counts = []
    for _ in range(6):
        turns.next()
        counts.append(len(writes) - before)
    show.close()
    assert counts == [0, 0, 1, 1, 1, 2]


def test_ten_thousand_clients(tmp_path: Path) -> None:
    show, count = Progress(tmp_path), 10_000
    show(begin(count))
    show(round_begin(1, count))
    for client in range(count):
        for event in (client_begin(client), step(client, 1), client_end(client)):
            show(event)
        if client == 5000:
            show(client_begin(5001))
            found = now(show)
            assert list(found["clients"]) == ["5001"]
            assert found["counts"]["waiting"] == count - 5002
            assert (tmp_path / PROGRESS).stat().st_size < 2000
    assert now(show)["counts"] == {
        "selected": count,
        "waiting": 0,
        "training": 0,
        "done": count,
        "rejected": 0,
        "late": 0,
        "unneeded": 0,
    }
    show.close()


def test_the_series_stays_short(tmp_path: Path) -> None:
    show = Progress(tmp_path)
    show(begin())
    for number in range(1, 501):
        for event in (round_begin(number), client_begin(0)):
            show(event)
        for position in range(1, 101):
            show(step(0, position, number + position / 100, 100))
        show({"event": "round", "round": number})
    losses = now(show)["losses"]
    show.close()
    assert 100 < len(losses) <= 240
    positions = [x for x, _ in losses]
    assert positions == sorted(positions)
    assert positions[-1] == pytest.approx(500, abs=0.1)
    assert all(y == pytest.approx(x + 1, abs=0.6) for x, y in losses)


def test_a_directory_that_is_gone_is_not_the_end(tmp_path: Path, turns: Turns) -> None:
    (tmp_path / "run").mkdir()
    show = Progress(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    for event in (begin(), round_begin(1)):
        show(event)
    turns.next()
    show.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_what_cannot_be_read(tmp_path: Path, text: str) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / PROGRESS).write_text(text)
    assert read_progress(tmp_path) is None
    Progress(tmp_path).close()
    assert json.loads((tmp_path / PROGRESS).read_text())["phase"] == "stopped"

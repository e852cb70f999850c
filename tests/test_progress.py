"""`progress.json`: what it says at every moment, and what it costs."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
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


def client_end(client: int, rejected: str = "") -> Event:
    return {"event": "client_end", "client": client, "metrics": {}, "rejected": rejected}


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
    }
    assert found["losses"][0] == [0.025, 2.5]  # the mean over the clients
    found = told(show, client_end(1, "a NaN"), client_begin(2), client_end(2))
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


def test_it_is_written_about_once_a_second(tmp_path: Path) -> None:
    show = Progress(tmp_path, interval=0.2)
    written = set()
    show(begin())
    show(round_begin(1))
    show(client_begin(0))
    until = time.monotonic() + 1.1
    number = 0
    while time.monotonic() < until:
        number += 1
        show(step(0, number, 2.0, 10**9))
        if number % 100 == 0:
            written.add((tmp_path / PROGRESS).stat().st_mtime_ns)
    show.close()
    assert 2 <= len(written) <= 7


def test_it_shows_that_the_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step can take minutes."""
    monkeypatch.setattr(module, "HEARTBEAT", 0.1)
    show = Progress(tmp_path, interval=0.05)
    before = now(show)["updated"]
    time.sleep(0.5)
    found = read_progress(tmp_path)
    show.close()
    assert found is not None
    assert found["updated"] > before


def test_steps_cost_nothing_noticeable(tmp_path: Path) -> None:
    show = Progress(tmp_path)
    for event in (begin(), round_begin(1), client_begin(0)):
        show(event)
    events = [step(0, number, 2.0, 100_000) for number in range(1, 100_001)]
    began = time.perf_counter()
    for event in events:
        show(event)
    taken = time.perf_counter() - began
    show.close()
    assert taken < 3  # a quarter of a second on an idle machine


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


def test_a_directory_that_is_gone_is_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    show = Progress(tmp_path / "run", interval=0.05)
    shutil.rmtree(tmp_path / "run")
    for event in (begin(), round_begin(1)):
        show(event)
    time.sleep(0.2)
    show.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_what_cannot_be_read(tmp_path: Path, text: str) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / PROGRESS).write_text(text)
    assert read_progress(tmp_path) is None
    Progress(tmp_path).close()
    assert json.loads((tmp_path / PROGRESS).read_text())["phase"] == "stopped"

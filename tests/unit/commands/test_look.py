"""A look at a run: what its files say, and whether a process works on it."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.look import Reader, participations
from fedlora.commands.run_files import read_run
from fedlora.errors import InputError
from fedlora.runs.progress import PROGRESS
from support.watch import START, a_round, look_at, snapshot, written


def test_held_up(tmp_path: Path) -> None:
    """It says nothing, but has the lock."""
    path = written(tmp_path / "a", [START], progress=snapshot(updated=time.time() - 3600))
    with (path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert look_at(path).alive


def test_on_another_machine(tmp_path: Path) -> None:
    there = {"host": "elsewhere", "pid": 1}
    path = written(tmp_path / "a", [START], progress=snapshot(**there))
    assert look_at(path).alive
    old = snapshot(**there, updated=time.time() - 3600)
    assert not look_at(written(tmp_path / "b", [START], progress=old)).alive


def test_a_run_that_was_resumed(tmp_path: Path) -> None:
    lines = [START, a_round(1), a_round(2), a_round(3), {"event": "resume", "round": 1}]
    path = written(tmp_path / "run", lines, progress=snapshot(round=2, finished=1))
    reader = Reader(path)
    look = reader.look()
    assert look is not None
    assert look.finished == 1
    with (path / "metrics.jsonl").open("a") as out:
        out.write(json.dumps(a_round(2)) + '\n{"event": "rou')
    look = reader.look()
    assert look is not None
    assert look.finished == 2


def client(number: int, outcome: str = "counted", **more: Any) -> dict[str, Any]:
    """A client in a round's line."""
    why = {"failed": "a NaN", "late": "too slow", "unneeded": "the round was full"}
    entry = {"client": number, "rank": 4, "num_examples": 7, "bytes_up": 10, "bytes_down": 20}
    return {**entry, "rejected": why.get(outcome, ""), "outcome": outcome, "metrics": {}, **more}


def test_every_clients_part_in_the_rounds(tmp_path: Path) -> None:
    first = a_round(1, clients=[client(0), client(1, "late"), client(2, metrics={"loss": 3.0})])
    second = a_round(2, clients=[client(0, "unneeded"), client(2, metrics={"loss": 2.0})])
    begin = {
        "event": "begin",
        "round": 0,
        "clients": [{"client": k, "name": f"site {k}", "rank": 4, "rows": 9} for k in range(4)],
    }
    parts = participations(read_run(written(tmp_path / "run", [begin, START, first, second])))
    assert [p.name for p in parts.values()] == [f"site {k}" for k in range(4)]
    told = {k: (p.asked, p.counted, p.last_round, p.outcome) for k, p in parts.items()}
    assert told == {
        0: (2, 1, 1, "unneeded"),
        1: (1, 0, None, "not_sampled"),
        2: (2, 2, 2, "counted"),
        3: (0, 0, None, "not_sampled"),
    }
    assert [(p.reason, p.reason_round) for p in parts.values()] == [
        ("the round was full", 2),
        ("too slow", 1),
        ("", None),
        ("", None),
    ]
    assert (parts[2].loss, parts[2].loss_before) == (2.0, 3.0)
    assert (parts[2].rows, parts[2].bytes_up, parts[2].bytes_down) == (9, 20, 40)


def test_lines_of_older_versions_say_less(tmp_path: Path) -> None:
    parts = participations(read_run(written(tmp_path / "run", [a_round(1)])))
    assert [p.outcome for p in parts.values()] == ["counted", "counted", "failed"]
    assert (parts[2].reason, parts[0].rows, parts[0].name) == ("a NaN", 10, "")


def test_the_state_of_a_run(tmp_path: Path) -> None:
    rounds = [START, a_round(1), a_round(2, attempts=3)]

    def look(name: str, ended: bool = False, **more: Any) -> Any:
        return look_at(written(tmp_path / name, rounds, progress=snapshot(**more), ended=ended))

    running = look("running", attempt=2)
    assert (running.state, running.round, running.attempts) == ("running", 3, 2)
    assert running.going_on
    stopped = look("stopped", phase="stopped", problem="interrupted")
    assert (stopped.state, stopped.round, stopped.attempts) == ("stopped", 2, 3)
    failed = look("failed", phase="stopped", problem="no space left on the device")
    assert (failed.state, failed.problem) == ("failed", "no space left on the device")
    silent = look("silent", host="elsewhere", updated=time.time() - 3600)
    assert (silent.state, silent.problem) == ("stopped", "")
    assert look("ended", ended=True).state == "ended"


def test_a_damaged_run_is_looked_at_as_far_as_it_goes(tmp_path: Path) -> None:
    broken = {"event": "round", "round": 2, "clients": [3, {"client": "x"}], "bytes_up": "many"}
    path = written(tmp_path / "run", [a_round(1), broken])
    (path / "config.yaml").write_text("client_ranks: [")
    with (path / "metrics.jsonl").open("a") as out:
        out.write("{half\n")
    (path / PROGRESS).write_text('{"phase": "training", "updated": "now"}')
    look = look_at(path)
    assert (look.state, look.finished, look.num_rounds) == ("stopped", 2, 0)
    assert (look.bytes_up, look.bytes_down) == (1500, 3000)
    assert len(look.damage) == 2
    (path / "config.yaml").unlink()
    assert look_at(path).damage[0].startswith("config.yaml is missing")


def test_a_run_that_has_just_begun_is_not_damaged(tmp_path: Path) -> None:
    look = look_at(written(tmp_path / "run", []))
    assert (look.state, look.damage, look.attempts) == ("running", (), 1)


def test_what_is_no_run(tmp_path: Path) -> None:
    assert Reader(tmp_path / "none").look() is None
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file; give the output directory"):
        Reader(tmp_path / "file").look()
    with pytest.raises(InputError, match=r"no run; there is no config\.yaml"):
        Reader(tmp_path).look()

"""Which sites take part, by the lines of a run."""

from __future__ import annotations

from typing import Any

from fedlora.engines.roster import Member, Roster, roster_of

BEGIN: dict[str, Any] = {
    "event": "begin",
    "round": 0,
    "run": "r1",
    "clients": [{"client": 0, "name": "a", "rank": 8}, {"client": 1, "name": "b", "rank": 4}],
}


def test_who_began_who_joined_and_who_left() -> None:
    join = {"event": "join", "round": 1, "client": 2, "name": "c", "rank": 2}
    leave = {"event": "leave", "round": 2, "client": 0, "name": "a", "reason": "done"}
    roster = roster_of([BEGIN, {"event": "round", "round": 1}, join, leave])
    assert roster.run == "r1"
    assert roster.members == {
        "a": Member(0, 8, "done"),
        "b": Member(1, 4),
        "c": Member(2, 2),
    }


def test_a_run_that_has_logged_nothing_is_new() -> None:
    assert roster_of([]) == Roster()
    assert roster_of([{"event": "begin", "round": 0, "clients": []}]) == Roster()

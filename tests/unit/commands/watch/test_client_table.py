"""The table of clients: what each does now, and its part in the rounds before."""

from __future__ import annotations

from pathlib import Path

from fedlora.commands.watch.client_table import clients, counts, left_out, table
from support.watch import START, a_round, look_at, snapshot, written


def test_clients_of_a_round_that_goes_on(tmp_path: Path) -> None:
    now = {"1": {"rank": 6, "state": "late", "step": 2, "steps": 9, "loss": 1.5}}
    path = written(tmp_path / "run", [START, a_round(1)], progress=snapshot(clients=now))
    look = look_at(path)
    found = clients(look)
    assert [client.state for client in found.values()] == ["-", "late", "-"]
    assert (found[1].rank, found[1].step, found[1].loss, found[1].before) == (6, 2, 1.5, 4.0)
    assert [(c.asked, c.counted, c.reason) for c in found.values()] == [
        (1, 1, ""),
        (1, 1, ""),
        (1, 0, "a NaN"),
    ]
    assert counts(look) == "2 training, 1 done of 3"


def test_clients_of_the_last_round(tmp_path: Path) -> None:
    path = written(tmp_path / "run", [START, a_round(1), a_round(2)], ended=True)
    look = look_at(path)
    assert [client.state for client in clients(look).values()] == ["done", "done", "rejected"]
    assert counts(look) == ""
    head, *rows = [row.plain for row in table(look, 80, 10)]
    assert head.split() == [
        "client",
        "rank",
        "state",
        "step",
        "loss",
        "before",
        "up",
        "down",
        "rounds",
    ]
    assert rows[0].split()[-1] == "2/2"
    assert rows[2].split()[-1] == "0/2"
    assert {len(row) for row in (head, *rows)} == {80}
    assert {len(row.plain) for row in table(look, 79, 10)} == {60}


def test_who_was_left_out_of_the_last_round(tmp_path: Path) -> None:
    full = {"rejected": "the round was full", "outcome": "unneeded"}
    line = a_round(2, count=4)
    line["clients"] = [line["clients"][0], *({**c, **full} for c in line["clients"][1:2])]
    line["clients"] += a_round(2, count=4)["clients"][2:]
    look = look_at(written(tmp_path / "run", [START, a_round(1, count=4), line], 4))
    assert left_out(look) == "client 1: the round was full; client 2: a NaN"
    both = a_round(2, count=4)
    both["clients"] = [{**c, **full} if c["client"] < 2 else c for c in both["clients"]]
    look = look_at(written(tmp_path / "two", [START, both], 4))
    assert left_out(look) == "clients 0 1: the round was full; client 2: a NaN"
    assert left_out(look_at(written(tmp_path / "none", []))) == ""

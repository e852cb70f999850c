"""Who took part in which round, and why the others did not."""

from __future__ import annotations

from pathlib import Path

from fedlora.commands.report.attendance import OUTCOMES, attendance
from fedlora.commands.run_files import read_run
from support.report_runs import lines_of, write_run


def test_what_became_of_every_client(tmp_path: Path) -> None:
    lines = lines_of(clients=4, rounds=3, layers=1)
    first, second, third = (line for line in lines if line["event"] == "round")
    del first["clients"][1]
    second["clients"][2] |= {"rejected": "too slow", "outcome": "late"}
    second["clients"][3] |= {"rejected": "the round was full", "outcome": "unneeded"}
    third["clients"][2]["rejected"] = "a NaN"  # as older versions say it
    third["attempts"] = 2
    found = attendance(read_run(write_run(tmp_path / "run", lines)), (0, 1, 2, 3))
    assert (found.rounds, found.attempts) == ((1, 2, 3), (1, 1, 2))
    assert found.times == {
        "counted": (3, 2, 1, 2),
        "failed": (0, 0, 1, 0),
        "late": (0, 0, 1, 0),
        "unneeded": (0, 0, 0, 1),
        "not_sampled": (0, 1, 0, 0),
    }
    assert found.absent == ((2, 2, "late", "too slow"), (3, 2, "failed", "a NaN"))


def test_a_run_without_a_round(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", []))
    assert attendance(run, ()).times == dict.fromkeys(OUTCOMES, ())

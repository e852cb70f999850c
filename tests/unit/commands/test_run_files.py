"""A run's directory as it is: what damaged lines hold, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.run_files import (
    bytes_of,
    is_run,
    listed,
    mapping,
    number,
    outcome_of,
    read_run,
    whole,
)
from support.report_runs import lines_of, write_run


@pytest.mark.parametrize(
    ("value", "plain", "count"),
    [
        (3, 3, 3),
        (3.0, 3.0, 3),
        (3.5, 3.5, None),
        (-1, -1, None),
        (True, None, None),
        ("3", None, None),
        (float("nan"), None, None),
        (10**400, None, None),
        (None, None, None),
    ],
)
def test_numbers_of_damaged_lines(value: Any, plain: Any, count: int | None) -> None:
    assert number(value) == plain
    assert whole(value) == count


def test_bytes_of_attempts_and_evaluations_count() -> None:
    line = {"bytes_up": 3, "bytes_down": 5, "evaluation_bytes_down": 7}
    given_up = {"given_up_bytes_up": 11, "given_up_bytes_down": 13}
    assert bytes_of(line) == (3, 12)
    assert bytes_of(line | given_up) == (14, 25)
    assert bytes_of({"bytes_up": "3"}) == (0, 0)


def test_mappings_of_damaged_lines() -> None:
    assert mapping({1: "a"}) == {"1": "a"}
    assert mapping([1]) == {}
    assert listed([{"a": 1}, 3, {"b": 2}]) == [{"a": 1}, {"b": 2}]
    assert listed("abc") == []


def test_what_became_of_a_client_also_in_older_lines() -> None:
    assert outcome_of({"outcome": "late", "rejected": "too slow"}) == "late"
    assert outcome_of({"rejected": "a NaN"}) == "failed"
    assert outcome_of({"rejected": ""}) == "counted"
    assert outcome_of({}) == "counted"


def test_a_whole_run_is_not_damaged(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", lines_of(clients=2, layers=1))
    run = read_run(path)
    assert is_run(path)
    assert (run.name, run.damage) == ("run", ())
    assert [line["round"] for line in run.rounds] == [1, 2, 3, 4]
    assert (run.last_round, run.planned) == (4, 4)
    assert (run.method, run.seed, len(run.evals)) == ("exact", 0, 1)


def test_damage_is_said_and_the_rest_is_read(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", lines_of(clients=2, layers=1), final=False)
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b"{half a li\n\xff\n")
    (path / "config.yaml").write_text("a: [")
    run = read_run(path)
    config, metrics = run.damage
    assert config.startswith("config.yaml is damaged")
    assert "2 lines are damaged and left out" in metrics
    assert run.last_round == 4
    assert not is_run(tmp_path)

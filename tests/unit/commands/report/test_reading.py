"""Runs' directories as they are: whole, unfinished or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.report.reading import find_runs, names_of, what_lacks
from fedlora.commands.run_files import read_run
from fedlora.errors import InputError
from support.report_runs import lines_of, write_run


def test_a_whole_run_has_no_problem(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", lines_of(clients=2, layers=1)), "it")
    assert what_lacks(run) == []
    assert [line["round"] for line in run.rounds] == [1, 2, 3, 4]
    assert (run.method, run.seed, len(run.evals)) == ("exact", 0, 1)


def test_what_lacks_is_said_and_the_rest_is_used(tmp_path: Path) -> None:
    lines = lines_of(clients=2, layers=1)
    path = write_run(tmp_path / "run", [lines[1], lines[2], lines[4]], final=False)
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b"{half a li\n\xff\n")
    (path / "config.yaml").write_text("a: [")
    run = read_run(path, "it")
    text = "\n".join(what_lacks(run))
    for part in (
        "config.yaml is damaged",
        "2 lines are damaged and left out",
        "no line on how it began",
        "no line of round 2",
        "not finished: 3 rounds",
    ):
        assert part in text
    assert [line["round"] for line in run.rounds] == [1, 3]


def test_runs_are_found_two_levels_below_and_once(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / name, lines_of(clients=2, layers=1), final=False)
        for name in ("study/a", "study/b", "c")
    ]
    found = find_runs([str(tmp_path), str(tmp_path / "c")])
    assert {path.resolve() for path in found} == {path.resolve() for path in paths}
    assert names_of([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]
    assert names_of([tmp_path / "x" / "a", tmp_path / "x" / "b"]) == ["a", "b"]
    (tmp_path / "empty").mkdir()
    for name, says in (("absent", "no such directory"), ("empty", "holds no run")):
        with pytest.raises(InputError, match=says):
            find_runs([str(tmp_path / name)])

"""`fedlora study`: what is asked for, without making a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.study.plan import Planned
from fedlora.commands.study.verb import describe, verb
from fedlora.errors import InputError
from support.study import study


def test_runs_are_listed_for_people_and_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(study(tmp_path))
    told: list[Any] = []
    assert verb([path, "--dry_run", "--seeds", "0"], told.append) == 0
    (line,) = told
    assert (line["study"], line["size"], len(line["runs"])) == ("mine", "small", 3)
    assert line["parts"]["table"]["left_out"] == ["fedit needs one rank for all clients"]
    assert verb([path, "--dry_run", "--where", "method=fedit"]) == 0
    out = capsys.readouterr().out
    assert "mine (small): 2 runs" in out
    assert out.count("->  runs/fedit-seed-") == 2


def test_a_run_by_what_it_stands_for() -> None:
    run = Planned("table", {"ranks": "equal", "method": "flora"}, 3, {})
    assert describe(run) == "table: equal flora seed 3"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "study: give a file or one of flora-paper, heterogeneity"),
        (["rules", "--where", "method"], "--where method: expected AXIS=VALUE"),
        (["rules", "--seeds", "-1"], "--seeds -1: expected a whole number from 0"),
        (["rules", "--processes", "0"], "--processes 0: expected a whole number from 1"),
        (["rules", "--part"], "a key without a value"),
        (["rules", "--size", "huge"], "--size huge: rules.yaml has"),
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        verb(arguments)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="out: is a file"):
        verb(["rules", "--output_dir", str(tmp_path / "out"), "--dry_run"])

"""`fedlora watch`: one look, for people and programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.watch.verb import verb
from fedlora.errors import InputError
from support.watch import START, a_round, snapshot, written


def test_one_look_as_a_program_reads_it(tmp_path: Path) -> None:
    path = written(tmp_path / "run", [START, a_round(1), a_round(2)], progress=snapshot())
    told: list[Any] = []
    assert verb([str(path), "--once"], told.append) == 0
    (look,) = told
    assert (look["round"], look["num_rounds"], look["alive"]) == (2, 4, True)
    assert look["share"] == 0.25
    assert (look["bytes_up"], look["bytes_down"]) == (3000, 6000)
    assert look["evaluation"] == {"loss": 2.0, "exact_match": 0.2}
    assert [client["client"] for client in look["clients"]] == [0, 1, 2]


def test_a_run_that_is_over_ends_the_view(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "run", [START, a_round(1)], ended=True)
    told: list[Any] = []
    assert verb([str(path)], told.append) == 0
    assert [look["ended"] for look in told] == [True]
    assert told[0]["share"] is None
    assert verb([str(path)]) == 0
    assert "round" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "watch: give the output directory of one run"),
        (["a", "b"], "watch: give the output directory of one run"),
        (["a", "--interval", "soon"], "--interval soon: expected seconds$"),
        (["a", "--interval", "0"], "--interval 0: expected seconds, more than 0"),
        (["a", "--interval", "inf"], "more than 0"),
        (["absent", "--once"], "absent: no run there"),
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        verb(arguments)

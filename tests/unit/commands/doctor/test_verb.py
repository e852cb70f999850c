"""`fedlora doctor`: its lines, its JSON and its exit code."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.commands.doctor import verb as module
from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING, Check
from fedlora.commands.doctor.verb import verb
from fedlora.errors import InputError

FINE, SLOW = Check("Python", OK, "3.11"), Check("load", WARNING, "9 processes", "wait")
BROKEN = Check("torch", PROBLEM, "does not work", "pip install torch")


def doctor(
    monkeypatch: pytest.MonkeyPatch, *checks: Check, emit: Any = None, arguments: Any = ()
) -> int:
    """The exit code where these lines were found."""
    monkeypatch.setattr(module, "probe", dict)
    monkeypatch.setattr(module, "examine", lambda machine: list(checks))
    return verb(list(arguments), emit)


def test_lines_for_a_person(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(monkeypatch, FINE, SLOW, BROKEN) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok      Python  3.11"
    assert lines[2].split() == ["->", "wait"]
    assert lines[-1] == "1 problem, 1 warning"
    assert doctor(monkeypatch, FINE) == 0
    assert capsys.readouterr().out.endswith("\nready\n")


def test_a_warning_prevents_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    assert doctor(monkeypatch, FINE, SLOW, emit=told.append) == 0
    assert doctor(monkeypatch, BROKEN, emit=told.append) == 1
    assert [line["ok"] for line in told] == [True, False]
    assert told[0]["checks"][1] == {
        "name": "load",
        "state": "warning",
        "found": "9 processes",
        "remedy": "wait",
    }


def test_an_option_that_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--gpu: doctor has no such option"):
        doctor(monkeypatch, FINE, arguments=["--gpu"])

"""The command `fedlora`: help, version, verbs and exit codes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora import __version__
from fedlora.commands import VERBS, cli
from fedlora.commands.cli import main
from fedlora.errors import InputError


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def with_verb(monkeypatch: pytest.MonkeyPatch, verb: Any) -> None:
    """`fedlora doctor` does this instead."""
    module = SimpleNamespace(HELP="help of doctor\n", verb=verb)
    monkeypatch.setattr(cli, "import_module", lambda name: module)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"], ["-h"], ["--help", "--json"]])
def test_help_names_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"fedlora {verb}" in text for verb in VERBS)


def test_the_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"fedlora {__version__}\n"
    assert main(["--version", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"fedlora": __version__}


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rnu"]) == 2
    assert capsys.readouterr().err == "fedlora: rnu: no such verb; did you mean run?\n"
    assert main(["xyzzy"]) == 2
    assert "there are run, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("a: wrong"), 2, "fedlora: a: wrong\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
    ],
)
def test_how_a_verb_ends(
    error: BaseException,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(arguments: list[str], emit: Any) -> int:
        raise error

    with_verb(monkeypatch, fails)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == says


def test_a_verb_gets_its_arguments_and_gives_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def verb(arguments: list[str], emit: Any) -> int:
        given.append((arguments, emit))
        return 1

    with_verb(monkeypatch, verb)
    assert main(["doctor", "--output_dir", "x"]) == 1
    assert given == [(["--output_dir", "x"], None)]
    assert main(["doctor", "--help"]) == 0
    assert capsys.readouterr().out == "help of doctor\n"


def test_a_mistake_of_ours_is_told_to_the_program_and_raised(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: list[str], emit: Any) -> int:
        raise ZeroDivisionError("oh")

    with_verb(monkeypatch, fails)
    with pytest.raises(ZeroDivisionError):
        main(["doctor", "--json"])
    told = json.loads(capfd.readouterr().out)
    assert told == {"event": "error", "message": "ZeroDivisionError: oh"}


def test_threads_that_wait_sleep_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = dict[str, str]()
    monkeypatch.setattr(cli.os, "environ", environment)
    cli.let_waiting_threads_sleep()
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "1000")):
        environment = {name: value}
        monkeypatch.setattr(cli.os, "environ", environment)
        cli.let_waiting_threads_sleep()
        assert environment == {name: value}

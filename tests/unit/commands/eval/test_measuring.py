"""What every measure of one evaluation shares."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.commands.eval.measuring import Measuring
from fedlora.errors import InputError
from support.measuring import measuring_of, said
from support.merging import peft_saves


def adapters(path: Path, base: Path, names: tuple[str, ...]) -> Path:
    """A directory with adapters below it."""
    for name in names:
        peft_saves(path / name if name else path, base, r=2, target_modules=["q_proj"])
    return path


def test_clients_models_are_measured_on_rows_and_elsewhere_where_they_are_named(
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = adapters(tmp_path / "a", tiny_llama, ("", "client-0", "client-1"))
    measuring = measuring_of(path, tmp_path / "eval")
    assert measuring.models_on_rows == ["base", "adapter", "client-0", "client-1"]
    assert measuring.models_elsewhere == ["base", "adapter"]
    named = measuring_of(path, tmp_path / "eval", ("client-1",))
    assert named.models_on_rows == named.models_elsewhere == ["client-1"]
    with pytest.raises(InputError, match="client-7"):
        measuring_of(path, tmp_path / "eval", ("client-7",))


def test_clients_models_alone_are_measured_everywhere(tiny_llama: Path, tmp_path: Path) -> None:
    path = adapters(tmp_path / "a", tiny_llama, ("client-0",))
    measuring = measuring_of(path, tmp_path / "eval")
    assert measuring.models_elsewhere == ["base", "client-0"]


@pytest.mark.parametrize(("asked", "used"), [(3, 3), (None, 8)])
def test_rows_at_once(asked: int | None, used: int, tmp_path: Path) -> None:
    assert measuring_of("embedded", tmp_path, batch_size=asked).batch_size == used


def test_what_is_said_is_printed_as_it_is_and_what_goes_on_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measuring = measuring_of("embedded", tmp_path)
    with measuring.saying("loading [x]"):
        measuring.say("[[rating]] 5")
    assert said(measuring) == "[[rating]] 5\n"
    assert capsys.readouterr().err == "loading [x] ...\n"


def test_a_terminal_shows_what_goes_on_in_a_line_that_goes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = measuring_of("embedded", tmp_path)
    terminal = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})
    measuring = Measuring(
        plain.subject, plain.options, plain.results, terminal, 8, ["base"], ["base"]
    )
    with measuring.saying("loading"):
        pass
    assert "loading" in said(measuring)
    assert capsys.readouterr().err == ""
    with measuring.saying("tasks", bars=True):
        pass
    assert capsys.readouterr().err == "tasks ...\n"

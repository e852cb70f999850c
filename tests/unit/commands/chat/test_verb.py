"""`fedlora chat`: lines that are answered, and what a person types in the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.chat import verb as chat
from fedlora.commands.chat.conversation import Conversation
from fedlora.errors import InputError


def test_every_line_is_a_message(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one>\n\n/reset\ntwo>\n/exit\nthree>\n"))
    told: list[Any] = []
    arguments = [str(tiny_llama), "--max_new_tokens", "3", "--use_cpu", "--num_threads", "1"]
    assert chat.verb(arguments, told.append) == 0
    assert [line["message"] for line in told] == ["one>", "two>"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one>\ntwo>\n"))
    capsys.readouterr()
    assert chat.verb(arguments) == 0
    assert capsys.readouterr().out == "".join(f"{line['answer']}\n" for line in told)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "chat: name a run's directory"),
        (["embedded", "--client", "0"], "client-0: no such model of embedded"),
        (["embedded", "--client", "x"], "expected a whole number of at least 0"),
        (["embedded", "--temperature", "-1"], "--temperature: '-1': expected a number of at least"),
        (["embedded", "--temperature", "hot"], "--temperature: 'hot': expected a number"),
        (["embedded", "--promt", "a"], "--promt: fedlora chat has no such option"),
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        chat.verb(arguments)


class Talk(Conversation):
    """A conversation that says what it was told, as far as it is let."""

    def __init__(self, ends: Exception | type[BaseException] | None = None) -> None:
        self.turns, self.forgotten, self.ends, self.resets = [], 0, ends, 0

    def reset(self) -> None:
        self.resets += 1

    def answer(self, message: str, tell: Any) -> str:
        tell(f"you said {message}")
        if self.ends is not None:
            raise self.ends
        self.forgotten += 2 * (message == "long")
        return message


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Have a person type these lines, or press these keys."""
    left: Iterator[str | type[BaseException]] = iter(lines)

    def read(prompt: str) -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_a_person_talks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk()
    typed(monkeypatch, "hello", "", "/rest", "/reset", KeyboardInterrupt, "long", EOFError)
    chat._talk_in_terminal(talk, "global")
    assert capsys.readouterr().out.splitlines() == [
        "global: you said hello",
        "(/rest: there are /reset and /exit)",
        "(a new conversation)",
        "",
        "(/exit or Ctrl-D ends)",
        "global: you said long",
        "(the beginning of the conversation no longer fits, and is left out)",
        "",
    ]
    assert talk.resets == 1


def test_an_answer_is_ended_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "hello", "/exit")
    chat._talk_in_terminal(Talk(KeyboardInterrupt), "base")
    assert capsys.readouterr().out == "base: you said hello (ended)\n"
    typed(monkeypatch, "hello", "/exit")
    chat._talk_in_terminal(Talk(InputError("the template refuses it")), "base")
    assert capsys.readouterr().out == "base: you said hello(the template refuses it)\n"

"""A site is asked until it has answered, or has failed too often."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedlora.engines.carrier import SiteError
from fedlora.engines.site_calls import LeftError, SiteCalls
from fedlora.engines.transport import Answer
from fedlora.federation.envelope import Header, Message, RefusedMessageError, encode
from fedlora.federation.handshake import Leave, leave_message

HEADER = Header("run", 1, 0, "train", "base", "agreement")
QUESTION = Message(HEADER, {"question": 1})
ANSWER = encode(Message(replace(HEADER, kind="trained"), {"answer": 1}))


class Scripted:
    """A transport whose answers are given, call by call."""

    def __init__(self, *calls: Sequence[Answer]) -> None:
        self.calls, self.asked, self.closed = list(calls), 0, False

    def names(self) -> Sequence[str]:
        return ["a"]

    def send(
        self, messages: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Answer]]:
        assert list(messages) == ["a"]
        self.asked += 1
        yield from (("a", answer) for answer in self.calls.pop(0))

    def status(self, name: str) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True


def read(message: Message) -> int:
    if "answer" not in message.body:
        raise RefusedMessageError("no answer")
    return int(message.body["answer"])


def calls(transport: Scripted, told: list[str] | None = None) -> SiteCalls:
    tell = (told if told is not None else []).append
    return SiteCalls(transport, tell, pauses=(0.0, 0.0))


def died() -> list[Answer]:
    return [SiteError("died", "its worker ended")]


def test_a_site_that_died_recovers_and_is_asked_again() -> None:
    transport, told, recovered = Scripted(died(), died(), [ANSWER]), list[str](), list[int]()
    site = calls(transport, told)
    assert site.ask("a", QUESTION, read, recover=lambda: recovered.append(1)) == 1
    assert (transport.asked, len(recovered)) == (3, 2)
    assert told == ["site a: its worker ended; it is asked again"]


def test_a_busy_site_is_asked_again_as_it_is() -> None:
    recovered: list[int] = []
    site = calls(Scripted([SiteError("busy", "at another")], [ANSWER]))
    assert site.ask("a", QUESTION, read, recover=lambda: recovered.append(1)) == 1
    assert not recovered


def test_it_is_not_asked_for_ever() -> None:
    transport = Scripted(died(), died(), died())
    with pytest.raises(SiteError, match="its worker ended"):
        calls(transport).ask("a", QUESTION, read)
    assert transport.asked == 3


@pytest.mark.parametrize("kind", ["refused", "failed", "deadline", "mistake"])
def test_what_will_not_be_better_the_next_time_is_not_asked_again(kind: str) -> None:
    transport = Scripted([SiteError(kind, "no")])
    with pytest.raises(SiteError):
        calls(transport).ask("a", QUESTION, read)
    assert transport.asked == 1


def test_nobody_is_asked_again_after_the_deadline_or_when_all_is_over() -> None:
    transport = Scripted(died(), died())
    with pytest.raises(SiteError):
        calls(transport).ask("a", QUESTION, read, deadline=time.monotonic())
    site = calls(transport)
    site.close()
    with pytest.raises(SiteError):
        site.ask("a", QUESTION, read)
    assert transport.asked == 2
    assert transport.closed


def test_answers_to_something_else_are_refused_and_the_right_one_is_taken() -> None:
    old = encode(Message(replace(HEADER, kind="trained", round=0), {"answer": 7}))
    told: list[str] = []
    assert calls(Scripted([b"garbage", old, ANSWER, ANSWER]), told).once("a", QUESTION, read) == 1
    assert told[0].startswith("site a: an answer is refused: it is cut short")
    assert told[1].startswith("site a: an answer is refused: it belongs to attempt 0 of round 0")
    with pytest.raises(SiteError, match="its answer is refused: it belongs to attempt"):
        calls(Scripted([old])).once("a", QUESTION, read)
    with pytest.raises(SiteError, match="nothing came of it"):
        calls(Scripted([])).once("a", QUESTION, read)


def test_a_site_may_leave_instead() -> None:
    left = encode(leave_message(HEADER, Leave("done here")))
    with pytest.raises(LeftError) as raised:
        calls(Scripted([left])).ask("a", QUESTION, read)
    assert raised.value.reason == "done here"

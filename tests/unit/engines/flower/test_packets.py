"""Messages of bytes in Flower's records."""

from __future__ import annotations

import sys

import pytest
from flwr.app import RecordDict

from fedlora.engines.carrier import SiteError
from fedlora.engines.flower import packets


@pytest.mark.parametrize("seconds", [None, 12.5])
def test_a_call_comes_back_as_it_was(seconds: float | None) -> None:
    content = packets.call_content(b"\x00message\xff", seconds)
    assert packets.read_call(content) == (b"\x00message\xff", seconds)
    assert [len(record) for record in content.array_records.values()] == [1]


def test_an_answer_or_what_became_of_it() -> None:
    assert packets.read_answer(packets.answer_content(b"answer")) == b"answer"
    error = packets.read_answer(packets.answer_content(SiteError("busy", "it trains")))
    assert isinstance(error, SiteError)
    assert (error.kind, error.reason) == ("busy", "it trains")


def test_records_of_another_app_are_refused() -> None:
    answer = packets.read_answer(RecordDict())
    assert isinstance(answer, SiteError)
    assert "not fedlora's" in answer.reason


def test_a_name_or_why_there_is_none() -> None:
    assert packets.read_name(packets.name_content("clinic")) == "clinic"
    absent = packets.read_name(packets.answer_content(SiteError("absent", "no worker")))
    assert isinstance(absent, SiteError)
    assert absent.kind == "absent"


def test_a_message_lives_as_long_as_it_is_waited_for() -> None:
    assert packets.ttl_of(30.0) == 30.0
    assert packets.ttl_of(None) > 24 * 3600
    assert packets.ttl_of(0.0) > 0, "Flower refuses a message that is dead already"


def test_packets_need_no_torch() -> None:
    assert "torch" not in {name.partition(".")[0] for name in vars(packets)}
    assert packets.__name__ in sys.modules

"""The line of a round."""

from __future__ import annotations

from fedlora.federation.records import ClientRecord, RoundRecord
from fedlora.runs.events import Evaluations, Round, Seconds
from fedlora.runs.round_line import round_line


def test_a_round_becomes_a_line() -> None:
    clients = tuple(ClientRecord(k, 4, 10, 0.5, 100, 40, {"loss": 1.0}) for k in (0, 1))
    record = RoundRecord(3, clients, 0.1, 0.0, 2.0, 8)
    seconds = Seconds(train=1.0, aggregate=2.0, evaluate=3.0)
    line = round_line(
        record, Evaluations(evaluation={"loss": 2.0}), {}, attempts=2, seconds=seconds
    )
    assert Round.__required_keys__ <= line.keys() <= set(Round.__annotations__)
    assert (line["event"], line["round"], line["seconds"]) == ("round", 3, seconds)
    assert line["attempts"] == 2
    assert (line["bytes_up"], line["bytes_down"]) == (80, 200)
    assert line["evaluation"] == {"loss": 2.0}
    assert "personal_evaluations" not in line
    assert not any(key.startswith("compression_error") for key in line)


def test_what_was_lost_and_given_up_stands_where_there_is_something() -> None:
    record = RoundRecord(
        1, (), None, 0.0, 0.0, 1, compression_error_up=0.01, compression_error_down=0.0
    )
    seconds = Seconds(train=0.0, aggregate=0.0, evaluate=0.0)
    line = round_line(record, Evaluations(), {}, attempts=2, given_up=(30, 70), seconds=seconds)
    assert (line["compression_error_up"], line["compression_error_down"]) == (0.01, 0.0)
    assert (line["given_up_bytes_up"], line["given_up_bytes_down"]) == (30, 70)
    assert line.keys() <= set(Round.__annotations__)
    once = round_line(record, Evaluations(), {}, attempts=1, seconds=seconds)
    assert "given_up_bytes_up" not in once


def test_models_of_clients_come_in_their_order() -> None:
    record = RoundRecord(1, (), None, 0.0, 0.0, 1)
    seconds = Seconds(train=0.0, aggregate=0.0, evaluate=0.0)
    line = round_line(
        record, Evaluations(), {10: {"loss": 1.0}, 2: {"loss": 2.0}}, attempts=1, seconds=seconds
    )
    assert list(line["personal_evaluations"]) == ["2", "10"]

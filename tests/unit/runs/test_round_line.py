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


def test_models_of_clients_come_in_their_order() -> None:
    record = RoundRecord(1, (), None, 0.0, 0.0, 1)
    seconds = Seconds(train=0.0, aggregate=0.0, evaluate=0.0)
    line = round_line(
        record, Evaluations(), {10: {"loss": 1.0}, 2: {"loss": 2.0}}, attempts=1, seconds=seconds
    )
    assert list(line["personal_evaluations"]) == ["2", "10"]

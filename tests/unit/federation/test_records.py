"""A round's record: bytes of all clients."""

from __future__ import annotations

from fedlora.federation.records import ClientRecord, RoundRecord


def record(client: int, down: int, up: int, rejected: str = "") -> ClientRecord:
    return ClientRecord(
        client=client,
        rank=4,
        num_examples=10,
        weight=0.5,
        bytes_down=down,
        bytes_up=up,
        metrics={},
        rejected=rejected,
    )


def round_of(*clients: ClientRecord) -> RoundRecord:
    return RoundRecord(
        round=1,
        clients=clients,
        aggregation_error=None,
        truncation_error=0.0,
        update_norm=1.0,
        global_rank=4,
    )


def test_bytes_are_those_of_all_clients_also_of_the_rejected() -> None:
    made = round_of(record(0, 100, 10), record(1, 200, 20, rejected="not finite"))
    assert (made.bytes_down, made.bytes_up) == (300, 30)


def test_a_round_without_clients_moves_nothing() -> None:
    assert (round_of().bytes_down, round_of().bytes_up) == (0, 0)

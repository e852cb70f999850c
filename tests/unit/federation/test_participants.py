"""Who takes part in a round, and with what weight."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fedlora.federation.exchange import Agreement
from fedlora.federation.participants import Federation
from fedlora.methods import METHODS


def federation(rows: list[int], seed: int = 0, **how: Any) -> Federation:
    """Clients with so many rows."""
    agreed = Agreement(METHODS["exact"], METHODS["exact"].options(), {"q": (3, 2)}, seed)
    return Federation([2] * len(rows), rows, agreed, **how)


def test_clients_without_rows_are_never_asked() -> None:
    assert federation([3, 0, 1]).sample(1) == [0, 2]
    few = federation([3, 0, 1, 5], clients_per_round=3)
    assert all(few.sample(round) == [0, 2, 3] for round in range(1, 9))


def test_a_share_is_rounded_and_a_number_bounded() -> None:
    for wanted, number in ((0.5, 3), (0.7, 4), (0.01, 1), (1.0, 5), (2, 2), (9, 5)):
        assert len(federation([1] * 5, clients_per_round=wanted).sample(1)) == number


def test_a_sample_is_that_of_its_seed_and_round_and_fair() -> None:
    many = federation([1] * 6, clients_per_round=2)
    assert many.sample(3) == many.sample(3) == sorted(set(many.sample(3)))
    counts = Counter(client for round in range(600) for client in many.sample(round))
    assert all(150 < counts[client] < 250 for client in range(6))  # 200 expected, sd 12
    other = federation([1] * 6, seed=1, clients_per_round=2)
    assert [many.sample(round) for round in range(20)] != [other.sample(r) for r in range(20)]


def test_weights_by_rows_or_all_alike() -> None:
    by_rows, alike = federation([1]), federation([1], client_weights="uniform")
    assert [by_rows.weight(n) for n in (0, 5, -1)] == [0.0, 5.0, 0.0]
    assert [alike.weight(n) for n in (0, 5, -1)] == [0.0, 1.0, 0.0]


def test_modules_of_single_clients() -> None:
    some = federation([1, 1], modules={1: frozenset({"q"})})
    assert some.trained_by(0) is None
    assert some.trained_by(1) == {"q"}
    assert some.shapes == {"q": (3, 2)}

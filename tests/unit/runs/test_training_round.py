"""One round under failure: whom it asks in what order, when it closes, when it is tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.errors import FedloraError
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.federation.server import Server
from fedlora.runs.engine import ClientResult, EngineState, Exchange, Failure
from fedlora.runs.round_clock import RoundClock
from fedlora.runs.training_round import FULL, TrainingRound
from support.simulated import serve, train

Answers = Callable[[int, Sequence[Broadcast]], Iterator[ClientResult | Failure]]


class Simulated:
    """An engine whose clients are simulated.

    Args:
        answers: gives what comes of an attempt (counted from 1) and its broadcasts.
    """

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.asked: list[list[int]] = []
        self.called_off = 0
        self.restored = 0

    def exchange(self, broadcasts: Sequence[Broadcast], deadline: float | None = None) -> Exchange:
        self.asked.append([sent.client for sent in broadcasts])
        try:
            yield from self.answers(len(self.asked), broadcasts)
        except GeneratorExit:
            self.called_off += 1
            raise

    def state(self) -> EngineState:
        return EngineState()

    def restore(self, state: EngineState) -> None:
        self.restored += 1


def result(update: ClientUpdate) -> ClientResult:
    return ClientResult(update, lambda: {"of": update.client})  # type: ignore[dict-item]


def round_of(
    server: Server, answers: Answers, told: list[Any] | None = None, **keys: Any
) -> tuple[TrainingRound, Simulated]:
    """The next round of a server, and its engine."""
    engine = Simulated(answers)
    session: Any = SimpleNamespace(config=Config(**keys))
    training = TrainingRound(
        session,
        server,
        engine,  # type: ignore[arg-type]
        (told if told is not None else []).append,
        RoundClock("aggregate"),
        due=False,
        personal=False,
    )
    return training, engine


def everyone(server: Server, *lost: int, first_attempt_only: bool = False) -> Answers:
    """All clients answer in the order they were asked, but for some that fail."""

    def answers(attempt: int, broadcasts: Sequence[Broadcast]) -> Iterator[ClientResult | Failure]:
        for sent in broadcasts:
            if sent.client in lost and (attempt == 1 or not first_attempt_only):
                yield Failure(sent.client, "its line is cut", late=sent.client % 2 == 1)
            else:
                yield result(train(server, sent))

    return answers


def outcomes(server: Server) -> dict[int, str]:
    return {c.client: c.outcome for c in server.commit().clients}


def test_all_that_are_asked_are_waited_for() -> None:
    server, told = serve("exact"), list[Any]()
    training, engine = round_of(server, everyone(server, 1, 2), told)
    training.run()
    assert engine.asked == [[0, 1, 2, 3]]
    assert not engine.called_off
    ends = [(e["client"], e["outcome"]) for e in told if e["event"] == "client_end"]
    assert ends == [(0, "counted"), (1, "late"), (2, "failed"), (3, "counted")]
    warnings = [e["message"] for e in told if e["event"] == "warning"]
    assert warnings == [f"client {k} is left out of round 1: its line is cut" for k in (1, 2)]
    assert outcomes(server) == dict(ends)
    assert training.models == {}


def test_a_round_that_is_full_closes_without_a_warning() -> None:
    server, told = serve("exact"), list[Any]()
    training, engine = round_of(server, everyone(server), told, clients_needed_per_round=3)
    training.run()
    (order,) = engine.asked
    assert sorted(order) == [0, 1, 2, 3]
    assert engine.called_off == 1
    expected = {**dict.fromkeys(order[:3], "counted"), order[3]: "unneeded"}
    last = told[-1]
    assert (last["client"], last["rejected"], last["outcome"]) == (order[3], FULL, "unneeded")
    assert not [e for e in told if e["event"] == "warning"]
    record = server.commit()
    assert {c.client: c.outcome for c in record.clients} == expected
    assert sum(c.weight for c in record.clients) == pytest.approx(1)


def test_who_fails_is_made_up_for() -> None:
    server = serve("exact")
    training, _ = round_of(server, everyone(server, 0, 1), clients_needed_per_round=2)
    training.run()
    found = outcomes(server)
    assert found[2] == found[3] == "counted"
    assert {found[0], found[1]} <= {"failed", "late", "unneeded"}


def test_a_round_that_needs_all_it_asks_begins_in_their_order() -> None:
    server = serve("exact")
    training, engine = round_of(server, everyone(server), clients_needed_per_round=4)
    training.run()
    assert engine.asked == [[0, 1, 2, 3]]
    assert set(outcomes(server).values()) == {"counted"}


def test_the_order_is_drawn_anew_for_every_round_and_the_same_for_every_run() -> None:
    orders = []
    for _ in range(2):
        server = serve("exact")
        for _ in range(8):
            training, engine = round_of(server, everyone(server), clients_needed_per_round=3)
            training.run()
            server.commit()
            orders += engine.asked
    assert orders[:8] == orders[8:]
    assert {order[3] for order in orders} == {0, 1, 2, 3}  # nobody is left out for ever


def test_a_round_below_its_quorum_is_tried_again() -> None:
    server, told = serve("exact"), list[Any]()
    answers = everyone(server, 0, 1, 2, first_attempt_only=True)
    keys = {"clients_needed_per_round": 3, "min_clients_per_round": 2}
    training, engine = round_of(server, answers, told, **keys)
    training.run()
    assert training.attempts == 2
    up, down = server.traffic()
    assert training.given_up == (up // 3, down)  # one client answered, and all were asked
    assert up > 0
    assert engine.asked[0] == engine.asked[1]
    assert engine.restored == 1
    begins = [e["attempt"] for e in told if e["event"] == "round_begin"]
    assert begins == [1, 2]
    assert sorted(outcomes(server).values()) == ["counted"] * 3 + ["unneeded"]


def test_a_round_that_stays_below_ends_the_run() -> None:
    server = serve("exact")
    training, engine = round_of(
        server, everyone(server, 0, 1, 2), min_clients_per_round=2, round_attempts=2
    )
    with pytest.raises(FedloraError, match=r"1 of 4 clients count, .* in 2 attempts"):
        training.run()
    assert len(engine.asked) == 2


def test_models_are_kept_of_clients_that_count() -> None:
    server = serve("exact")
    training, _ = round_of(server, everyone(server, 3), save_client_models=True)
    training.run()
    assert {k: delta for k, (delta, _) in training.models.items()} == {
        k: {"of": k} for k in range(3)
    }

"""The engine whose clients all train in this process: what it reports, keeps and identifies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.client.trainer import train
from fedlora.config.config import Config
from fedlora.engines.local import LocalEngine
from fedlora.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlora.methods.values import RoundNumbers
from fedlora.runs.engine import EngineState


def session(**keys: Any) -> Any:
    """A session without model and data."""
    client = SimpleNamespace(train=[1], eval=[])
    return SimpleNamespace(
        config=Config(cohort_size=2, **keys),
        base=SimpleNamespace(tied=True),
        data=SimpleNamespace(clients=[client] * 3, eval=[]),
        general=[],
        federation=SimpleNamespace(agreement=None),
        fingerprints={"base": "b", "data": "d"},
        other_bases={},
    )


def broadcast(client: int) -> Broadcast:
    """What a client of rank 4 is sent."""
    return Broadcast(1, client, 4, {}, {}, {}, {}, 0, RoundNumbers({}, (4,)))


def test_every_client_is_announced_once_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    engine = LocalEngine(session(), train, told.append)
    groups = []

    def handle(worker: Any, group: Any, on_step: Any) -> list[Any]:
        groups.append([sent.client for sent in group])
        on_step(group[0].client)(1, 5, 0.5, 100)
        updates = [ClientUpdate(sent.client, 1, {}, 1) for sent in group]
        return [SimpleNamespace(update=u, model={"of": u.client}) for u in updates]

    monkeypatch.setattr(type(engine.worker), "handle_together", handle)
    answers = list(engine.exchange([broadcast(k) for k in range(3)]))
    assert [answer.client for answer in answers] == [0, 1, 2]
    assert answers[2].model() == {"of": 2}
    assert sorted(k for group in groups for k in group) == [0, 1, 2]
    begins = [e for e in told if e["event"] == "client_begin"]
    assert [(e["client"], e["rank"]) for e in begins] == [(0, 4), (1, 4), (2, 4)]
    steps = [e for e in told if e["event"] == "step"]
    assert steps[0] == {
        "event": "step", "client": 0, "step": 1, "steps": 5, "loss": 0.5, "tokens": 100,
    }  # fmt: skip


def test_a_round_that_is_full_trains_no_further_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who trained beside the last that counts is as it was before."""
    engine = LocalEngine(session(), train, lambda event: None)
    before = ClientState({})
    engine.states[1] = before
    groups = []

    def handle(worker: Any, group: Any, on_step: Any) -> list[Any]:
        groups.append([sent.client for sent in group])
        engine.states.update({sent.client: ClientState({}) for sent in group})
        return [
            SimpleNamespace(update=ClientUpdate(sent.client, 1, {}, 1), model={}) for sent in group
        ]

    monkeypatch.setattr(type(engine.worker), "handle_together", handle)
    outcomes = engine.exchange([broadcast(k) for k in (2, 1, 0)])
    first = next(outcomes)
    outcomes.close()
    assert first.client == 2
    assert 0 not in [client for group in groups for client in group]
    assert engine.states.keys() == {1, 2}
    assert engine.states[1] is before


def test_another_training_is_another_run() -> None:
    def mine(model: Any, rows: Any, training: Any) -> dict[str, float]:
        return {}

    ours = LocalEngine(session(), train, print).identity
    theirs = LocalEngine(session(), mine, print).identity
    assert {key: ours[key] for key in ("base", "data")} == {"base": "b", "data": "d"}
    assert ours["train_function"] != theirs["train_function"]


def test_what_outlives_a_round_is_found_again() -> None:
    engine = LocalEngine(session(), train, print)
    engine.states[1] = ClientState({})
    engine.cohorts.size = 1
    saved = engine.state()
    assert saved.facts == {"cohort_size": 1}
    fresh = LocalEngine(session(), train, print)
    fresh.restore(EngineState({**saved.facts, "best": None}, saved.clients))
    assert fresh.cohorts.size == 1
    assert fresh.states.keys() == {1}
    assert fresh.worker.states is fresh.states
    assert not fresh.can_evaluate
    fresh.close()

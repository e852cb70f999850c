"""The engine of sites: what it asks, what it makes of the answers, and what it keeps."""

from __future__ import annotations

import inspect
from dataclasses import replace
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlora.client.trainer import name_of_trainer, train
from fedlora.config.config import Config
from fedlora.data.datasets import FederatedData
from fedlora.engines.carrier import SiteError
from fedlora.engines.roster import Member
from fedlora.engines.site_calls import SiteCalls
from fedlora.engines.site_handshake import Handshake, Opened
from fedlora.engines.sites import SitesEngine
from fedlora.errors import InputError
from fedlora.federation.envelope import Message
from fedlora.federation.exchange import Agreement
from fedlora.federation.handshake import (
    Evaluated,
    Leave,
    counted_of,
    evaluated_message,
    leave_message,
)
from fedlora.federation.increments import Sketch
from fedlora.federation.messages import Broadcast, ClientUpdate, Lacking
from fedlora.federation.participants import Federation
from fedlora.federation.server import initial_state
from fedlora.federation.wire import trained_message
from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from fedlora.methods.values import RoundNumbers
from fedlora.runs.engine import ELSEWHERE, ClientResult, Engine, EngineState, Failure, Left
from support.told_sites import BASE, Say, ToldSites, handshaking, joined

SHAPES = {"q": (4, 3)}
RULE = METHODS["exact"]
FEDERATION = Federation([2, 2], [10, 11], Agreement(RULE, RULE.options(), SHAPES, 0))


class Rounds:
    """What the engine asks a server, whose clients lack nothing; what it was asked is noted."""

    def __init__(self) -> None:
        self.held: dict[int, list[int | None]] = {0: [], 1: []}
        self.lagging: list[int] = []

    def unconfirmed(self, client: int) -> None:
        self.lagging.append(client)

    def lacking(self, client: int, held: int | None) -> Lacking:
        self.held[client].append(held)
        return Lacking(held, {})

    def model_lacking(self, held: int | None) -> Lacking:
        return Lacking(held, {})

    def has_drifted(self, confirmation: Sketch) -> bool:
        return bool(confirmation)


def engine(say: Say, events: list[Any] | None = None, **opened: Any) -> SitesEngine:
    """An engine whose sites a (client 0) and b (client 1) have joined."""
    session: Any = SimpleNamespace(
        config=Config(method="exact"),
        federation=FEDERATION,
        base=None,
        sites=(SimpleNamespace(base=BASE, label_names=()),),
        data=FederatedData((), (), "text", {}, ""),
        general=(),
        evaluates=False,
    )
    notices: SimpleQueue[str] = SimpleQueue()
    calls = SiteCalls(ToldSites("ab", say), notices.put, pauses=(0.0,))
    told = {name: joined(name, k, 2, eval_rows=4) for k, name in enumerate("ab")}
    parts = {"joined": told, "waiting": (), "left": {}, **opened}
    sites = SitesEngine(
        Opened(session, Handshake(session.config, "r1", calls), **parts),
        (events if events is not None else []).append,
        notices,
    )
    server: Any = Rounds()
    sites.serve(server)
    return sites


def broadcasts(round: int = 1) -> list[Broadcast]:
    numbers = RoundNumbers({"q": 2}, (2,))
    return [Broadcast(round, client, 2, {}, {}, {}, {}, 0, numbers) for client in (0, 1)]


def trained(name: str, message: Message) -> Message:
    """The answer of a site that has trained, or evaluated."""
    if message.header.kind in ("join", "agree"):
        return handshaking(name, message, eval_rows=4)
    client = "ab".index(name)
    if message.header.kind == "evaluate":
        told = Evaluated(4, 40 * (client + 1), {"loss": 1.0 + client})
        return evaluated_message(message.header, told)
    adapter = {"q": LowRank(torch.ones(2, 3), torch.ones(4, 2))}
    update = ClientUpdate(client, message.header.round, adapter, 10)
    return trained_message(message.header, [update], {}, {})


def by_client(outcomes: Any) -> dict[int, Any]:
    return {outcome.client: outcome for outcome in outcomes}


def test_it_is_an_engine() -> None:
    for name, wanted in vars(Engine).items():
        if not name.startswith("_"):
            own = inspect.getattr_static(SitesEngine, name)
            assert isinstance(own, property) is isinstance(wanted, property)


def test_every_site_is_asked_and_answers() -> None:
    events: list[Any] = []
    sites = engine(trained, events)
    outcomes = by_client(sites.exchange(broadcasts()))
    assert all(isinstance(outcome, ClientResult) for outcome in outcomes.values())
    assert sorted(e["client"] for e in events if e["event"] == "client_begin") == [0, 1]
    assert sites.identity["base"] == BASE
    assert list(sites.exchange([])) == []


def test_what_a_site_goes_on_from_is_what_counted_last() -> None:
    asked: list[tuple[tuple[int, int], tuple[int, int]]] = []

    def say(name: str, message: Message) -> Message:
        if name == "a":
            header = message.header
            asked.append(((header.round, header.attempt), counted_of(message)))
        return trained(name, message)

    sites = engine(say)
    for round in (1, 2, 2, 3):  # the first attempt of round 2 is given up
        before = sites.state()
        list(sites.exchange(broadcasts(round)))
        if len(asked) == 2:
            sites.restore(EngineState(sites.state().facts, before.clients))
    assert asked == [
        ((1, 0), (0, 0)),
        ((2, 0), (1, 0)),
        ((2, 1), (1, 0)),
        ((3, 0), (2, 1)),
    ]
    again = engine(say)
    again.restore(sites.state())
    list(again.exchange(broadcasts(4)))
    assert asked[-1] == ((4, 0), (3, 0))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (SiteError("failed", "its training failed"), "its training failed"),
        (SiteError("deadline", "it is over"), "it was not done by the round's deadline"),
        (SiteError("refused", "no"), "no"),
    ],
)
def test_what_becomes_of_a_site_that_does_not_train(answer: SiteError, says: str) -> None:
    def say(name: str, message: Message) -> Message | SiteError:
        return answer if name == "b" else trained(name, message)

    outcomes = by_client(engine(say).exchange(broadcasts()))
    assert isinstance(outcomes[0], ClientResult)
    assert outcomes[1] == Failure(1, says, late=answer.kind == "deadline")


def test_a_site_is_sent_what_it_lacks_of_what_it_has_confirmed() -> None:
    """Site b loses its model in round 2, and has drifted in round 3."""

    def say(name: str, message: Message) -> Message | SiteError:
        number, held = message.header.round, message.body["held"]
        if name == "b" and number == 2 and held is not None:
            return SiteError("lost", "it rests on a model that is not here")
        answer = trained(name, message)
        if name == "b" and number == 3:
            return replace(answer, body={**answer.body, "confirmation": {"q": [1.0]}})
        return answer

    sites = engine(say)
    outcomes = [by_client(sites.exchange(broadcasts(round))) for round in (1, 2, 3, 4)]
    server: Any = sites.server
    assert server.held == {0: [None, 0, 1, 2], 1: [None, 0, None, 1, None]}
    assert [isinstance(of[1], ClientResult) for of in outcomes] == [True, True, False, True]
    assert "is not the server's any more" in outcomes[2][1].reason


def test_a_site_that_comes_back_has_to_be_the_same() -> None:
    def other(name: str, message: Message) -> Message | SiteError:
        if message.header.kind == "train":
            return SiteError("died", "it is gone")
        return handshaking(name, message, data="other rows")

    failure = by_client(engine(other).exchange(broadcasts()))[0]
    assert isinstance(failure, Failure)
    assert "it came back with another base, rank or rows" in failure.reason


def test_who_leaves_is_asked_no_more() -> None:
    def say(name: str, message: Message) -> Message:
        if name == "b":
            return leave_message(message.header, Leave("done"))
        return trained(name, message)

    sites = engine(say)
    outcomes = by_client(sites.exchange(broadcasts()))
    assert outcomes[1] == Failure(1, "its site leaves the run: done")
    assert list(sites.changes()) == [Left(1, "b", "done")]
    assert list(sites.changes()) == []
    assert by_client(sites.exchange(broadcasts()))[1] == Failure(1, "its site has left")
    early = engine(trained, left={"c": Member(2, 4, "gone")})
    assert list(early.changes()) == [Left(2, "c", "gone")]


def test_sites_evaluate_and_are_weighted_by_what_they_count() -> None:
    sites = engine(trained)
    state = initial_state(FEDERATION)
    out = sites.evaluate(state)
    assert sites.can_evaluate
    assert out["evaluation"] == {"loss": pytest.approx((40 * 1.0 + 80 * 2.0) / 120)}
    assert out["client_evaluations"] == {"0": {"loss": 1.0}, "1": {"loss": 2.0}}
    assert sites.evaluate_client(0, {}, {}) == {}


def test_a_site_that_does_not_evaluate_is_left_out_and_told() -> None:
    events: list[Any] = []

    def say(name: str, message: Message) -> Message | SiteError:
        return SiteError("failed", "memory") if name == "b" else trained(name, message)

    out = engine(say, events).evaluate(initial_state(FEDERATION))
    assert out["evaluation"] == {"loss": 1.0}
    assert [e["message"] for e in events] == ["site b does not evaluate: memory"]


def test_rows_of_a_site_may_not_change() -> None:
    saved = engine(trained).state()
    other = {name: {**facts, "data": "other"} for name, facts in saved.facts["sites"].items()}
    with pytest.raises(InputError, match="sites: a has other rows than when the run began"):
        engine(trained).restore(EngineState({"sites": other}))


def test_the_end_is_told_and_calls_are_closed() -> None:
    sites = engine(trained)
    transport: Any = sites.calls.transport
    transport.say = lambda name, message: leave_message(message.header, Leave("too"))
    sites.say_goodbye()
    assert [(name, header.kind) for name, header in transport.asked] == [
        ("a", "leave"),
        ("b", "leave"),
    ]
    sites.close()
    assert transport.closed


def test_a_simulation_says_how_its_clients_train() -> None:
    """So that it does not go on with another training than the one it began with."""
    sites = engine(trained)
    sites.session.config = Config(engine="flower")
    assert sites.identity["train_function"] == ELSEWHERE
    sites.session.config = Config(engine="flower", train_file="rows.jsonl")
    assert sites.identity["train_function"] == name_of_trainer(train)

"""The course of a run under an engine of another kind: any order, clients that fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fedlora.client.trainer import train
from fedlora.config.config import Config
from fedlora.engines.local import make_worker, run_session
from fedlora.federation.messages import Broadcast, ClientState
from fedlora.lowrank import Deltas
from fedlora.methods.values import ServerState
from fedlora.runs.course import has_personal_models
from fedlora.runs.engine import (
    ClientResult,
    Engine,
    EngineState,
    Exchange,
    Failure,
    Joined,
    Left,
)
from fedlora.runs.evaluation import Evaluator
from fedlora.runs.events import LOGGED, REPORTED, Evaluations, Event, Report
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.round_clock import RoundClock
from fedlora.runs.session import Session, assemble
from support.courses import take_course, tensor_files
from support.paths import REPOSITORY

pytestmark = pytest.mark.usefixtures("kept_bases")


Order = Callable[[Sequence[Broadcast]], list[Broadcast]]


class OneByOne:
    """An engine that trains one client after the other.

    Args:
        session: of the run.
        order: in which the clients of a round answer.
        fails: `(round, client)` of those that fail.
        silent: `(round, client)` of those nothing comes of.
    """

    def __init__(
        self,
        session: Session,
        order: Order,
        fails: Sequence[tuple[int, int]] = (),
        silent: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.order, self.fails, self.silent, self.closed = order, fails, silent, 0
        self.states: dict[int, ClientState] = {}
        self.worker = make_worker(session, train, self.states)
        self.evaluator = Evaluator(session, self.states, has_personal_models(session))

    identity: Mapping[str, str] = {"data": "of the test"}
    can_evaluate = True

    def changes(self) -> Sequence[Joined | Left]:
        return ()

    def exchange(self, broadcasts: Sequence[Broadcast], deadline: float | None = None) -> Exchange:
        for sent in self.order(broadcasts):
            if (sent.round, sent.client) in self.fails:
                yield Failure(sent.client, "its machine is gone")
            elif (sent.round, sent.client) not in self.silent:
                (trained,) = self.worker.handle_together([sent])
                yield ClientResult(trained.update, partial(getattr, trained, "model"))

    def evaluate(self, state: ServerState) -> Evaluations:
        return self.evaluator.of_server(state)

    def evaluate_client(
        self, client: int, model: Deltas, dense: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        return self.evaluator.of_client(client, model, dense)

    def state(self) -> EngineState:
        return EngineState({"cohort_size": 1}, self.states)

    def restore(self, state: EngineState) -> None:
        self.states.update(state.clients)

    def close(self) -> None:
        self.closed += 1


def ascending(broadcasts: Sequence[Broadcast]) -> list[Broadcast]:
    return list(broadcasts)


def shuffled(broadcasts: Sequence[Broadcast]) -> list[Broadcast]:
    """Clients 0 1 2 3 as 3 1 0 2."""
    return [broadcasts[k] for k in (3, 1, 0, 2)]


def engine_in(
    order: Order, *lost: Sequence[tuple[int, int]]
) -> Callable[[Session, Report], Engine]:
    """Makes the engine of a course."""
    return lambda session, tell: OneByOne(session, order, *lost)


def untimed(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of rounds without what was measured in seconds."""
    out = []
    for line in lines:
        if line["event"] == "round":
            clients = [
                {**c, "metrics": {k: x for k, x in c["metrics"].items() if k == "loss"}}
                for c in line["clients"]
            ]
            out.append({**line, "clients": clients, "seconds": None})
    return out


@pytest.fixture
def keys(small_run: dict[str, Any]) -> dict[str, Any]:
    return {**small_run, "max_steps": 2, "save_client_models": True, "eval_personal": True}


@pytest.mark.parametrize("method", ["exact", "fedsa"])
def test_the_order_of_answers_changes_no_bit(
    keys: dict[str, Any], tmp_path: Path, method: str
) -> None:
    """Nor does a client that fails, be it reported or silent, change the others'."""
    keys = {**keys, "method": method, "client_ranks": [4, 4, 4, 4]}
    if method == "fedsa":
        keys |= {"save_client_models": False, "eval_personal": False}
    fails, silent = [(1, 1)], [(2, 3)]
    results = {}
    for name, order in (("in order", ascending), ("shuffled", shuffled)):
        events: list[Event] = []
        engine_of = engine_in(order, fails, silent)
        results[name] = take_course(keys, tmp_path / name, engine_of, events)
        warnings = [e["message"] for e in events if e["event"] == "warning"]
        assert warnings == [
            "client 1 is left out of round 1: its machine is gone",
            "client 3 is left out of round 2: it did not answer",
        ]
        ends = [e["client"] for e in events if e["event"] == "client_end"]
        assert sorted(ends[:4]) == sorted(ends[4:]) == [0, 1, 2, 3]
    one, other = results.values()
    assert tensor_files(one.output_dir) == tensor_files(other.output_dir)
    assert any(name.startswith("final/") for name in tensor_files(one.output_dir))
    assert json.dumps(untimed(one.metrics)) == json.dumps(untimed(other.metrics))
    for line, absent in zip(untimed(one.metrics), (1, 3), strict=True):
        weights = [c["weight"] for c in line["clients"]]
        assert [k for k, weight in enumerate(weights) if not weight] == [absent]
        assert sum(weights) == pytest.approx(1.0)


def test_another_engine_makes_the_same_run(keys: dict[str, Any], tmp_path: Path) -> None:
    """As this process does, whose events and lines are those that are named."""
    events: list[Event] = []
    session = assemble(Config(**{**keys, "cohort_size": 1, "output_dir": str(tmp_path / "local")}))
    local = run_session(session, report=events.append)
    keys["cohort_size"] = 1
    other = take_course(keys, tmp_path / "other", engine_in(shuffled))
    assert tensor_files(local.output_dir) == tensor_files(other.output_dir)
    assert json.dumps(untimed(local.metrics)) == json.dumps(untimed(other.metrics))

    assert {event["event"] for event in events} == {*REPORTED} - {"warning"}
    for event in events:
        assert_named(event, REPORTED)
    for line in read_metrics(local.output_dir):
        assert_named(line, LOGGED)


def assert_named(event: Event, table: Mapping[str, Any]) -> None:
    """The fields are those of the event's type: all that are required, and no other."""
    kind = table[event["event"]]
    assert kind.__required_keys__ <= event.keys() <= set(kind.__annotations__), event["event"]


def test_lines_of_earlier_code_are_named() -> None:
    lines = read_metrics(REPOSITORY / "tests" / "data" / "run")
    assert {"begin", "start", "round"} <= {line["event"] for line in lines}
    for line in lines:
        assert_named(line, LOGGED)


def test_every_second_of_a_round_counts_for_one_part() -> None:
    time = 0.0

    def wait(seconds: float) -> None:
        nonlocal time
        time += seconds

    clock = RoundClock("aggregate", lambda: time)
    wait(1)
    clock.now("train")
    wait(10)
    with clock.meanwhile("aggregate"):
        wait(2)
    wait(20)
    with clock.meanwhile("evaluate"):
        wait(100)
    wait(30)
    clock.now("aggregate")
    wait(4)
    clock.now("evaluate")
    wait(200)
    assert clock.seconds() == {"train": 60, "aggregate": 7, "evaluate": 300}

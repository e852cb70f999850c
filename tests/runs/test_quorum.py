"""Rounds below `min_clients_per_round` are tried again, and never committed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora import Config
from fedlora.client.trainer import train
from fedlora.engines.local import LocalEngine
from fedlora.errors import FedloraError, InputError
from fedlora.federation.messages import Broadcast
from fedlora.lowrank import LowRank
from fedlora.runs.engine import Exchange, Failure
from fedlora.runs.events import Event
from fedlora.runs.results import Result
from fedlora.runs.session import assemble
from support.courses import take_course, tensor_files
from support.runs import run

pytestmark = pytest.mark.usefixtures("kept_bases")


class LosesAnswers(LocalEngine):
    """An engine on whose way some answers are lost, after their clients have trained.

    Args:
        lost: `(round, attempt)` -> the clients that do not get through, the attempt counted from 1.
        arguments: of the engine.
    """

    def __init__(self, lost: Mapping[tuple[int, int], set[int]], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lost, self.attempts = lost, dict[int, int]()

    def exchange(self, broadcasts: Sequence[Broadcast], deadline: float | None = None) -> Exchange:
        number = broadcasts[0].round
        attempt = self.attempts[number] = self.attempts.get(number, 0) + 1
        for result in super().exchange(broadcasts, deadline):
            gone = result.client in self.lost.get((number, attempt), ())
            yield Failure(result.client, "its line is cut") if gone else result


def take(
    keys: Mapping[str, Any], out: Path, lost: Mapping[tuple[int, int], set[int]], told: list[Event]
) -> Result:
    return take_course(keys, out, lambda x, tell: LosesAnswers(lost, x, train, tell), told)


@pytest.fixture
def keys(small_run: dict[str, Any]) -> dict[str, Any]:
    """`fedsa`: a factor stays with its client, and would keep the trace of a lost attempt."""
    equal = {"method": "fedsa", "client_ranks": [4, 4, 4, 4]}
    return {**small_run, **equal, "max_steps": 2, "min_clients_per_round": 3, "round_attempts": 2}


def test_a_round_that_is_tried_again_leaves_no_trace(keys: dict[str, Any], tmp_path: Path) -> None:
    told: list[Event] = []
    disturbed = take(keys, tmp_path / "disturbed", {(1, 1): {0, 2}, (2, 1): {0, 1, 2, 3}}, told)
    assert tensor_files(run(keys, "quiet").output_dir) == tensor_files(disturbed.output_dir)
    again = [e["message"] for e in told if e["event"] == "warning" and "again" in e["message"]]
    lines = [line for line in disturbed.metrics if line["event"] == "round"]
    assert [line["attempts"] for line in lines] == [2, 2]
    assert again == [
        "2 of 4 clients count in round 1, fewer than min_clients_per_round 3; it is tried again",
        "0 of 4 clients count in round 2, fewer than min_clients_per_round 3; it is tried again",
    ]


def test_enough_clients_are_enough(keys: dict[str, Any], tmp_path: Path) -> None:
    """A client less than asked: the round counts, in one attempt, without it."""
    told: list[Event] = []
    result = take(keys, tmp_path / "out", {(1, 1): {2}}, told)
    first = next(line for line in result.metrics if line["event"] == "round")
    assert [c["client"] for c in first["clients"] if not c["weight"]] == [2]
    assert sum(c["weight"] for c in first["clients"]) == pytest.approx(1)
    assert sum(e["event"] == "round_begin" for e in told) == 2


def test_a_run_that_stops_below_it_goes_on_later(keys: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FedloraError, match=r"2 of 4 clients count, .* in 2 attempts; nothing"):
        take(keys, out, {(2, 1): {0, 3}, (2, 2): {1, 3}}, [])
    assert [path.name for path in sorted(out.glob("round-*"))] == ["round-1"]
    resumed = fedlora.run(resume=out)
    assert tensor_files(resumed.output_dir) == tensor_files(run(keys, "quiet").output_dir)


def test_a_round_closes_with_the_updates_it_needs(keys: dict[str, Any]) -> None:
    """Repeated and resumed runs in one process have the same bytes; the others leave no trace."""
    keys |= {"num_rounds": 3, "clients_needed_per_round": 3, "cohort_size": 2}
    told: list[Event] = []

    def stop(result: Any) -> None:
        if result.record.round == 1:
            raise KeyboardInterrupt

    whole = run(keys, "whole", report=told.append)
    with pytest.raises(KeyboardInterrupt):
        run(keys, "resumed", callbacks=[stop])
    resumed = fedlora.run(resume=Path(keys["output_dir"]).with_name("resumed"))
    assert tensor_files(whole.output_dir) == tensor_files(resumed.output_dir)
    assert not [e for e in told if e["event"] == "warning"]
    lines = [line for line in whole.metrics if line["event"] == "round"]
    for line in lines:
        assert line["attempts"] == 1
        (left,) = (c for c in line["clients"] if c["outcome"] == "unneeded")
        assert (left["weight"], left["bytes_up"]) == (0, 0)
        assert left["rejected"] == "the round was full"
        counted = [c for c in line["clients"] if c["outcome"] == "counted"]
        assert sum(c["weight"] for c in counted) == pytest.approx(1)
        assert len(counted) == 3


class SendsNonsense(LocalEngine):
    """An engine that brings client 0 twice, client 9, and updates that nobody asked for."""

    def exchange(self, broadcasts: Sequence[Broadcast], deadline: float | None = None) -> Exchange:
        for result in super().exchange(broadcasts, deadline):
            update = result.update
            if result.client == 0:
                yield result
            if result.client == 1:
                update = replace(update, round=update.round + 1)
            if result.client == 2:
                halves = {n: LowRank(x.A[:1], x.B[:, :1]) for n, x in update.adapter.items()}
                update = replace(update, adapter=halves)
            yield replace(result, update=update)
        yield replace(result, update=replace(result.update, client=9))


def test_answers_that_nobody_asked_for_end_no_run(keys: dict[str, Any], tmp_path: Path) -> None:
    told: list[Event] = []
    keys |= {"method": "exact", "num_rounds": 1, "min_clients_per_round": 2}
    result = take_course(
        keys, tmp_path / "out", lambda session, tell: SendsNonsense(session, train, tell), told
    )
    warnings = [event["message"] for event in told if event["event"] == "warning"]
    assert warnings == [
        "an answer of client 0 that nobody waits for is ignored",
        "client 1 is left out of round 1: client 1 sent an update of round 2 that nobody asked for",
        "client 2 is left out of round 1: client 2 sent modules, shapes or ranks other than those "
        "asked for",
        "an answer of client 9 that nobody waits for is ignored",
    ]
    line = next(line for line in result.metrics if line["event"] == "round")
    assert [bool(client["weight"]) for client in line["clients"]] == [True, False, False, True]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"min_clients_per_round": 5}, "a round asks 4 clients; lower it, or raise clients_per"),
        (
            {"clients_per_round": 0.5},
            "min_clients_per_round: 3, but a round asks 2 clients; lower it",
        ),
        ({"clients_needed_per_round": 5}, "a round asks 4 clients; lower it"),
        ({"clients_needed_per_round": 2}, "3 are more than clients_needed_per_round 2"),
        ({"clients_per_round": 2}, "min_clients_per_round: 3 are more than clients_per_round 2"),
        ({"round_timeout": 9.0}, "round_timeout belongs to another engine than local"),
        ({"round_attempts": 0}, "round_attempts: 0 must be"),
    ],
)
def test_rounds_that_cannot_be_are_refused(
    keys: dict[str, Any], changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        assemble(Config(**{**keys, **changed}))

"""Sites that are late, fail, die, answer nonsense, come later or leave: each with its outcome."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.engines.carrier import SiteError
from fedlora.engines.transport import Answer
from fedlora.errors import FedloraError, InputError
from fedlora.federation.envelope import Message, decode, encode
from fedlora.federation.wire import TRAIN
from fedlora.runs.events import Event
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.results import Result
from support.conformance import Keys, assert_same, for_rule, in_memory, three_clients
from support.courses import tensor_files
from support.sites import InMemoryTransport, SiteInMemory, federate, federate_on, sites_of

pytestmark = pytest.mark.usefixtures("kept_bases")
Ask = Callable[[], Answer]
Answers = Iterator[tuple[str, Answer]]


@pytest.fixture
def keys(small_run: Keys) -> Keys:
    return {**three_clients(small_run), "num_rounds": 2}


@pytest.fixture
def sites(keys: Keys, tmp_path: Path) -> dict[str, SiteInMemory]:
    """The sites alpha, beta and delta."""
    return sites_of(keys, tmp_path / "at")


def weights(result: Result) -> list[list[bool]]:
    """Round by round, which client counts."""
    rounds = [line for line in result.metrics if line["event"] == "round"]
    return [[bool(client["weight"]) for client in line["clients"]] for line in rounds]


def warnings(events: list[Event]) -> list[str]:
    return [event["message"] for event in events if event["event"] == "warning"]


def of_training(message: Message, round: int = 1) -> bool:
    return (message.header.kind, message.header.round) == (TRAIN, round)


def test_who_is_late_is_left_out_and_catches_up(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path
) -> None:
    """What comes of it later is nobody's answer any more."""
    second, events = threading.Event(), list[Event]()

    def late(name: str, message: Message, ask: Ask) -> Answers:
        if of_training(message, 2):
            second.set()
        if name == "beta" and of_training(message):
            second.wait(120)
        yield name, ask()

    keys |= {"round_timeout": 10.0}
    result = federate(keys, tmp_path / "out", InMemoryTransport(sites, mangle=late), events)
    assert weights(result) == [[True, False, True], [True, True, True]]
    assert warnings(events) == [
        "client 1 is left out of round 1: it was not done by the round's deadline"
    ]


def test_a_round_that_is_full_tells_the_others_to_stop(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path
) -> None:
    """Site delta answers only when the round that it was asked in is over."""
    told, events = threading.Event(), list[Event]()

    def slow(name: str, message: Message, ask: Ask) -> Answers:
        if name == "delta" and of_training(message):
            told.wait(120)
        yield name, ask()

    class Telling(InMemoryTransport):
        def cancel(self, names: Sequence[str]) -> None:
            super().cancel(names)
            told.set()

    keys |= {"clients_needed_per_round": 2, "num_rounds": 1}
    transport = Telling(sites, mangle=slow)
    result = federate(keys, tmp_path / "out", transport, events)
    assert weights(result) == [[True, True, False]]
    (line,) = [line for line in result.metrics if line["event"] == "round"]
    assert [client["outcome"] for client in line["clients"]] == ["counted", "counted", "unneeded"]
    assert ("delta", "cancel") in transport.sent
    assert warnings(events) == []


def test_a_site_whose_training_fails_is_left_out(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path
) -> None:
    def fails(round: int, attempt: int) -> None:
        if round == 1:
            raise ZeroDivisionError("no steps")

    sites["delta"].fails, events = fails, list[Event]()
    result = federate(keys, tmp_path / "out", InMemoryTransport(sites), events)
    assert weights(result) == [[True, True, False], [True, True, True]]
    assert warnings(events) == ["client 2 is left out of round 1: ZeroDivisionError: no steps"]


@pytest.mark.parametrize("method", ["exact", "fedsa"])
def test_a_worker_that_is_killed_comes_back_and_changes_nothing(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path, method: str
) -> None:
    """In round 1 before it has trained, in round 2 after: its answer is lost, and asked again."""
    keys, events, killed = {**for_rule(keys, method), "num_rounds": 2}, list[Event](), set[int]()

    def kills(name: str, message: Message, ask: Ask) -> Answers:
        number = message.header.round
        if name == "beta" and message.header.kind == TRAIN and number not in killed:
            killed.add(number)
            if number == 2:
                ask()
            sites["beta"].restart()
            yield name, SiteError("died", "the worker ended before it had answered")
        else:
            yield name, ask()

    result = federate(keys, tmp_path / "out", InMemoryTransport(sites, mangle=kills), events)
    quiet = in_memory(keys, tmp_path / "quiet")
    name = "round-2/state/server.safetensors"
    assert tensor_files(quiet.output_dir)[name] == tensor_files(result.output_dir)[name]
    told = "site beta: the worker ended before it had answered; it is asked again"
    assert [text for text in warnings(events) if "asked again" in text] == [told, told]


def test_a_site_that_stays_away_is_asked_again_in_the_next_round(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path
) -> None:
    transport, events, away = InMemoryTransport(dict(sites)), list[Event](), sites["alpha"]

    def goes(name: str, message: Message, ask: Ask) -> Answers:
        if name == "alpha" and of_training(message):
            transport.sites.pop("alpha", None)  # type: ignore[attr-defined]
        if of_training(message, 2) and name != "alpha":
            away.restart()
            transport.sites["alpha"] = away  # type: ignore[index]
        yield name, ask()

    transport.mangle = goes
    keys |= {"num_rounds": 3}
    result = federate(keys, tmp_path / "out", transport, events)
    assert weights(result)[0] == [False, True, True]
    assert weights(result)[2] == [True, True, True]
    assert "client 0 is left out of round 1: no worker has its socket there" in warnings(events)


def test_an_attempt_below_quorum_leaves_no_trace_at_the_sites(keys: Keys, tmp_path: Path) -> None:
    """Also where clients keep something: they go on from what counted."""
    keys = {**for_rule(keys, "fedsa"), "min_clients_per_round": 3, "num_rounds": 3}
    quiet = federate(keys, tmp_path / "quiet", InMemoryTransport(sites_of(keys, tmp_path / "a")))
    sites, events = sites_of(keys, tmp_path / "b"), list[Event]()

    def fails(round: int, attempt: int) -> None:
        if (round, attempt) in ((1, 0), (3, 0), (3, 1)):
            raise ZeroDivisionError("no steps")

    sites["beta"].fails = fails
    result = federate(keys, tmp_path / "out", InMemoryTransport(sites), events)
    assert tensor_files(quiet.output_dir) == tensor_files(result.output_dir)
    assert weights(quiet) == weights(result)
    rounds = [line for line in result.metrics if line["event"] == "round"]
    assert [line["attempts"] for line in rounds] == [2, 1, 3]
    assert sites["alpha"].trained == [(1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (3, 2)]


def test_answers_that_come_twice_or_late_change_nothing(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path
) -> None:
    """Every answer comes three times, the one of the round before it first; it is refused."""
    before, events = dict[str, Answer](), list[Event]()

    def twice(name: str, message: Message, ask: Ask) -> Answers:
        answer = ask()
        if message.header.kind == TRAIN:
            if name in before:
                yield name, before[name]
            before[name] = answer
        yield name, answer
        yield name, answer

    result = federate(keys, tmp_path / "out", InMemoryTransport(sites, mangle=twice), events)
    assert_same(in_memory(keys, tmp_path / "quiet"), result)
    assert sorted(warnings(events)) == [
        f"site {name}: an answer is refused: it belongs to attempt 0 of round 1; the present one "
        "is attempt 0 of round 2"
        for name in sorted(sites)
    ]


def test_the_same_question_twice_trains_once(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path
) -> None:
    def twice(name: str, message: Message, ask: Ask) -> Answers:
        first = ask()
        if message.header.kind == TRAIN:
            assert first == ask()
        yield name, first

    transport = InMemoryTransport(sites, mangle=twice)
    result = federate(keys, tmp_path / "out", transport)
    assert_same(in_memory(keys, tmp_path / "quiet"), result)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"run": "other"}, "it belongs to run other, not to"),
        ({"base": "other"}, "it was made for a base model of other weights"),
        ({"agreement": "other"}, "the other side holds to another agreement"),
        ({"attempt": 7}, "it belongs to attempt 7 of round 1"),
        ({"kind": "evaluated"}, "it is evaluated, not an update|answers no message evaluated"),
    ],
)
@pytest.mark.parametrize("asked", [True, False], ids=["of the server", "of the site"])
def test_messages_that_belong_elsewhere(
    keys: Keys,
    sites: dict[str, SiteInMemory],
    tmp_path: Path,
    changed: dict[str, Any],
    says: str,
    asked: bool,
) -> None:
    """A site refuses such a question, and the server such an answer; both say why."""
    events: list[Event] = []

    def mangled(name: str, message: Message, ask: Ask) -> Answers:
        if name != "beta" or not of_training(message):
            yield name, ask()
        elif asked:
            header = replace(message.header, **changed)
            data = encode(replace(message, header=header))
            try:
                yield name, sites["beta"].answer(data)
            except SiteError as error:
                yield name, error
        else:
            answer = ask()
            assert isinstance(answer, bytes)
            told = decode(answer)
            yield name, encode(replace(told, header=replace(told.header, **changed)))

    keys |= {"num_rounds": 1}
    result = federate(keys, tmp_path / "out", InMemoryTransport(sites, mangle=mangled), events)
    assert weights(result) == [[True, False, True]]
    (out,) = (text for text in warnings(events) if "client 1 is left out" in text)
    assert re.search(says, out)


def test_garbage_is_refused(keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path) -> None:
    events: list[Event] = []

    def garbles(name: str, message: Message, ask: Ask) -> Answers:
        yield name, b"nonsense" * 10 if name == "beta" and of_training(message) else ask()

    result = federate(keys, tmp_path / "out", InMemoryTransport(sites, mangle=garbles), events)
    assert weights(result) == [[True, False, True], [True, True, True]]
    assert "client 1 is left out of round 1: its answer is refused: " in warnings(events)[-1]


# --- who takes part ---


def test_a_site_joins_later_and_another_leaves_for_good(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path
) -> None:
    """Both are on the record, and a server that is killed afterwards knows of both."""
    keys |= {"client_ranks": 4, "num_rounds": 4, "min_clients_per_round": 1}
    there = {name: sites[name] for name in ("beta", "delta")}
    transport, events = InMemoryTransport(there, sorted(sites)), list[Event]()

    def comes_and_goes(round: Any) -> None:
        if round.record.round == 1:
            transport.sites["alpha"] = sites["alpha"]  # type: ignore[index]
            sites["beta"].leaves = "the study is over here"
        if round.record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(keys, tmp_path / "out", transport, events, [comes_and_goes])
    result = federate_on(tmp_path / "out", transport)
    lines = [x for x in read_metrics(tmp_path / "out") if x["event"] in ("join", "leave", "round")]
    asked = [[c["client"] for c in line["clients"]] for line in lines if line["event"] == "round"]
    assert asked == [[0, 1], [0, 1, 2], [1, 2], [1, 2]]
    joined, left = lines[1], next(line for line in lines if line["event"] == "leave")
    assert joined == {
        "event": "join", "round": 1, "client": 2, "name": "alpha", "rank": 4, "rows": 24,
        "eval_rows": 0, "tokens": joined["tokens"],
    }  # fmt: skip
    assert left == {
        "event": "leave", "round": 2, "client": 0, "name": "beta",
        "reason": "the study is over here",
    }  # fmt: skip
    told = warnings(events)
    assert "client 2 (alpha) takes part from round 2 on: rank 4, 24 rows" in told
    assert "client 0 (beta) has left after round 2: the study is over here" in told
    assert result.final_dir.is_dir()
    assert not any(site.service.status()["run"] for site in (sites["alpha"], sites["delta"]))


def test_a_site_that_does_not_go_with_the_others_takes_no_part_later(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path
) -> None:
    keys |= {"client_ranks": 4, "min_clients_per_round": 1, "method": "fedit"}
    sites["alpha"].site = sites["alpha"].site.model_copy(update={"rank": 2})
    sites["alpha"].restart()
    there = {name: sites[name] for name in ("beta", "delta")}
    transport, events = InMemoryTransport(there, sorted(sites)), list[Event]()

    def comes(round: Any) -> None:
        transport.sites["alpha"] = sites["alpha"]  # type: ignore[index]

    result = federate(keys, tmp_path / "out", transport, events, [comes])
    assert weights(result) == [[True, True], [True, True]]
    assert "site alpha takes no part: method fedit needs rank 4 of all, it has 2" in warnings(
        events
    )


@pytest.mark.parametrize("leaves", [False, True])
def test_all_sites_have_to_be_there_unless_fewer_are_enough(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path, leaves: bool
) -> None:
    out, there = tmp_path / "out", {name: sites[name] for name in ("alpha", "beta")}
    if leaves:
        there["delta"] = sites["delta"]
        there["delta"].leaves = "not this time"
    says = "delta takes no part: not this time" if leaves else "delta: no worker has its socket"
    with pytest.raises(InputError, match=f"sites: {says}"):
        federate(keys, out, InMemoryTransport(there, sorted(sites)))
    assert not out.exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_clients": 4, "client_ranks": None}, "num_clients: 4, but there are 3 sites"),
        ({"client_ranks": [4, 2]}, "client_ranks: 2 ranks for 3 clients"),
        ({"lora_target_modules": ["nothing"]}, "sites: alpha: "),
        ({"method": "fedit"}, "fedit needs one rank"),
    ],
)
def test_mistakes_before_the_first_round(
    keys: Keys,
    sites: dict[str, SiteInMemory],
    tmp_path: Path,
    changed: dict[str, Any],
    says: str,
) -> None:
    with pytest.raises(FedloraError, match=says):
        federate({**keys, **changed}, tmp_path / "out", InMemoryTransport(sites))
    assert not (tmp_path / "out").exists()


def test_a_site_with_other_rows_cannot_go_on(
    keys: Keys, sites: dict[str, SiteInMemory], tmp_path: Path
) -> None:
    def stop(round: Any) -> None:
        raise KeyboardInterrupt

    transport = InMemoryTransport(sites)
    with pytest.raises(KeyboardInterrupt):
        federate(keys, tmp_path / "out", transport, callbacks=[stop])
    other = sites["beta"].site
    files = {**other.settings, "train_file": sites["alpha"].site.settings["train_file"]}
    sites["beta"].site = other.model_copy(update={"settings": files})
    sites["beta"].restart()
    with pytest.raises(InputError, match="sites: beta has other rows than when the run began"):
        federate_on(tmp_path / "out", transport)

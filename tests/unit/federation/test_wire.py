"""Broadcasts, updates and states as messages: the same values come back, and nothing twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.federation.envelope import Header, Message, RefusedMessageError, decode, encode
from fedlora.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlora.federation.wire import (
    GroupNames,
    read_train,
    read_trained,
    train_message,
    trained_message,
)
from fedlora.lowrank import Adapter, Deltas, Dense, LowRank
from fedlora.methods.values import RoundNumbers

HEADER = Header("run", 2, 0, "", "base", "agreement")
SHAPES = {"layers/0.q": (5, 3), "layers/0.v": (4, 3)}
NUMBERS = RoundNumbers(dict.fromkeys(SHAPES, 4), (2, 4))


def factors(rank: int, seed: int) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(torch.randn(rank, n, generator=rng), torch.randn(m, rank, generator=rng))
        for name, (m, n) in SHAPES.items()
    }


def broadcasts() -> list[Broadcast]:
    """Three clients, two of one rank; a dense module in the adapter, and a head."""
    adapter: Deltas = {**factors(6, 0), "layers/0.v": Dense(torch.ones(4, 3))}
    leading = {4: factors(4, 1), 2: factors(2, 2)}
    for of_rank in leading.values():  # what is held as factors is its own leading directions
        of_rank["layers/0.q"] = adapter["layers/0.q"]  # type: ignore[index]
    head = {"score.weight": torch.randn(2, 3)}
    return [
        Broadcast(
            round=2,
            client=client,
            rank=rank,
            adapter=adapter,
            leading=leading[rank],
            base_delta={},
            dense=head,
            nbytes=77,
            numbers=NUMBERS,
            modules=frozenset(["layers/0.q"]) if client == 5 else None,
        )
        for client, rank in ((1, 4), (3, 2), (5, 2))
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, LowRank):
        return same(one.A, other.A) and same(one.B, other.B)
    if isinstance(one, Dense):
        return same(one.W, other.W)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(x, other[key]) for key, x in one.items())
    return bool(one == other)


def sent(message: Message) -> Message:
    return decode(encode(message))


def test_broadcasts_come_back_as_they_were() -> None:
    states = {3: ClientState({"layers/0.q.B": torch.randn(5, 2)})}
    given = broadcasts()
    message, known = train_message(HEADER, given, states, GroupNames())
    back, back_states = read_train(sent(message), {})
    for one, other in zip(given, back, strict=True):
        assert same(vars(one), vars(other))
    assert list(back_states) == [3]
    assert same(back_states[3].factors, states[3].factors)
    assert known == {"g0", "g1", "g2", "g3", "g4"}


def test_what_is_the_same_for_several_clients_is_sent_once() -> None:
    """The adapter and the head of three clients, the leading directions of two: each one time."""
    clients = broadcasts()
    message, _ = train_message(HEADER, clients, {}, GroupNames())
    distinct = {
        id(x)
        for b in clients
        for d in (b.adapter, b.leading, b.dense)
        for value in d.values()
        for x in ([value] if isinstance(value, torch.Tensor) else list(vars(value).values()))
    }
    assert len(message.tensors) == len(distinct)
    back, _ = read_train(sent(message), {})
    assert back[0].adapter is back[1].adapter is back[2].adapter
    assert back[1].leading is back[2].leading
    assert same(back[0].leading["layers/0.q"], back[0].adapter["layers/0.q"])


def test_groups_that_are_known_do_not_travel_again() -> None:
    first, *others = broadcasts()
    names, groups = GroupNames(), dict[str, Any]()
    message, known = train_message(HEADER, [first], {}, names)
    read_train(sent(message), groups)
    for broadcast in others:
        message, known = train_message(HEADER, [broadcast], {}, names, known)
        (back,), _ = read_train(sent(message), groups)
        assert same(broadcast.adapter, back.adapter)
        assert same(broadcast.leading, back.leading)
    assert not message.tensors  # the last client is sent what the one before it was


def updates(sends: str = "AB") -> list[ClientUpdate]:
    return [
        ClientUpdate(
            client=client,
            round=2,
            adapter=factors(rank, 7 + client),
            num_examples=10 * client,
            dense={"score.weight": torch.randn(2, 3)},
            metrics={"loss": 0.5, "seconds": 1, "note": "x", "bad": float("nan")},
            sends=sends,
        )
        for client, rank in ((1, 4), (3, 2))
    ]


@pytest.mark.parametrize("sends", ["AB", "A", "B"])
def test_updates_come_back_as_they_were(sends: str) -> None:
    states = {1: ClientState({"layers/0.q.B": torch.randn(5, 4)})}
    given = updates(sends)
    message = trained_message(HEADER, given, states)
    back, back_states = read_trained(sent(message), {1: SHAPES, 3: SHAPES})
    for one, other in zip(given, back, strict=True):
        assert (one.client, one.num_examples, one.sends) == (
            other.client,
            other.num_examples,
            other.sends,
        )
        assert other.metrics == {"loss": 0.5, "seconds": 1, "note": "x", "bad": None}
        assert same(one.tensors, other.tensors)
        assert one.nbytes == other.nbytes
        for x in other.adapter.values():
            for factor in {"A", "B"} - set(sends):
                assert not getattr(x, factor).any()  # in the place of what was not sent
    assert same(back_states[1].factors, states[1].factors)


def change(message: Message, **body: Any) -> Message:
    return replace(message, body={**message.body, **body})


def test_parts_that_do_not_fit_together_are_refused() -> None:
    asked, _ = train_message(HEADER, broadcasts(), {}, GroupNames())
    entry = asked.body["clients"][0]
    for wrong in (
        change(asked, clients=[{**entry, "rank": 0}]),
        change(asked, clients=[{**entry, "client": -1}]),
        change(asked, clients=[{**entry, "client": True}]),
        change(asked, clients=[{**entry, "groups": {}}]),
        change(asked, clients=7),
        change(asked, groups=["g0"]),
        change(asked, groups={**asked.body["groups"], "g9": ["a"]}),
        change(asked, same={"g1/a/A": "g9/a/A"}),
        change(asked, widths={"layers/0.q": "4"}),
        replace(asked, body={}),
        replace(asked, tensors={**asked.tensors, "nothing": torch.ones(1)}),
        replace(asked, tensors={**asked.tensors, "g0/layers/0.q/C": torch.ones(1)}),
        replace(asked, tensors={**asked.tensors, "g0/layers/0.q/A": torch.ones(2, 2)}),
    ):
        with pytest.raises(RefusedMessageError, match="do not fit together"):
            read_train(wrong, {})


def test_answers_of_others_and_of_other_modules_are_refused() -> None:
    answer = trained_message(HEADER, updates(), {})
    first, second = answer.body["clients"]
    fewer = {name: x for name, x in answer.tensors.items() if name != "1/A/layers/0.q"}
    for wrong in (
        change(answer, clients=[{**first, "client": 4}, second]),
        change(answer, clients=[{**first, "sends": "BA"}, second]),
        change(answer, clients=[{**first, "num_examples": 1.5}, second]),
        change(answer, clients=[{**first, "metrics": {"loss": [1]}}, second]),
        replace(answer, tensors=fewer),
        replace(answer, tensors={**answer.tensors, "1/A/other": torch.ones(4, 3)}),
    ):
        with pytest.raises(RefusedMessageError, match="do not fit together"):
            read_trained(wrong, {1: SHAPES, 3: SHAPES})

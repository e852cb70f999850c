"""What is kept of the rounds' changes, what they make of a model, and sketches of it."""

from __future__ import annotations

import pytest
import torch

from fedlora.federation.codec import as_new
from fedlora.federation.increments import (
    agree,
    appended,
    changes_since,
    laid_out,
    laid_out_to_send,
    merged,
    sketch,
    worth_keeping,
)
from fedlora.lowrank import Delta, Dense, LowRank, prefix, to_dense
from fedlora.methods.tracking import unchanged, with_images
from fedlora.methods.values import Change, Increment, Prepared, ServerState
from support.adapters import random_lowrank

SHAPE = (30, 20)


def low(rank: int, seed: int) -> LowRank:
    return random_lowrank(SHAPE, rank, seed)


def test_what_is_laid_out_already_is_not_copied() -> None:
    x, part = low(4, 1), prefix(low(4, 2), 2)
    deltas = {"a": x, "b": Dense(to_dense(x))}
    assert laid_out(deltas) is deltas
    found = laid_out({**deltas, "b": part})
    assert found["a"] is x
    b = found["b"]
    assert isinstance(b, LowRank)
    assert as_new(b.B) is b.B
    assert torch.equal(b.B, part.B)
    # What leads itself does so still, and is copied once.
    sent = laid_out_to_send(Prepared({"a": part, "b": x}, {"a": part, "b": part}))
    assert sent.leading["a"] is sent.adapter["a"]
    assert sent.leading["b"] is not sent.adapter["b"]


def test_what_is_merged_is_added_module_by_module() -> None:
    base = {"a": low(2, 1), "b": low(2, 2)}
    after = merged(base, {"b": low(1, 3), "c": low(1, 4)})
    assert after["a"] is base["a"]
    b = after["b"]
    assert b.rank == 3
    torch.testing.assert_close(to_dense(b), to_dense(base["b"]) + to_dense(low(1, 3)))
    assert torch.equal(to_dense(after["c"]), to_dense(low(1, 4)))


def test_an_increment_makes_the_next_adapter_and_its_directions() -> None:
    whole = low(3, 1)
    leading = with_images(whole, torch.linalg.qr(low(2, 2).A.T).Q.T.contiguous())
    stack = low(2, 5)
    increment = Increment(stack, torch.tensor([-1.0]), torch.eye(3, 4, dtype=stack.A.dtype))
    increment = Increment(stack, increment.weights.to(stack.A), increment.turn)
    adapter: dict[str, Delta] = {"a": whole, "b": whole}
    after, directions = appended(
        adapter, {"a": leading, "b": leading}, {"a": increment, "b": unchanged(leading)}
    )
    assert after["b"] is whole
    assert directions["b"] is leading
    taken = leading.B[:, :1] @ leading.A[:1]
    torch.testing.assert_close(to_dense(after["a"]), to_dense(whole) - taken + to_dense(stack))
    found = directions["a"]
    torch.testing.assert_close(found.B, to_dense(after["a"]) @ found.A.T)


def state_with(changes: dict[int, Change], last_seen: dict[int, int], rank: int = 9) -> ServerState:
    base = {"a": low(rank, 1)}
    return ServerState(5, {}, base_delta=base, last_seen=last_seen, changes=changes)


CHANGES = {number: Change({"a": low(2, number)}) for number in (2, 3, 4, 5)}


@pytest.mark.parametrize(
    ("last_seen", "kept"),
    [
        ({0: 5, 1: 5}, [5]),  # who was sent round 5 holds the model of round 4
        ({0: 5, 1: 4}, [4, 5]),
        ({0: 5, 1: 2}, [2, 3, 4, 5]),
        ({0: 1}, [2, 3, 4, 5]),  # what is gone is gone
        ({}, [5]),
    ],
)
def test_changes_are_kept_for_those_who_lack_them(
    last_seen: dict[int, int], kept: list[int]
) -> None:
    assert list(worth_keeping(state_with(CHANGES, last_seen))) == kept


def test_changes_are_kept_while_they_are_smaller_than_the_whole() -> None:
    assert list(worth_keeping(state_with(CHANGES, {0: 2}, rank=6))) == [4, 5]
    assert list(worth_keeping(state_with(CHANGES, {0: 2}, rank=1))) == [5]


def test_an_increment_as_large_as_its_module_is_not_kept() -> None:
    leading = low(1, 3)
    small = Increment(low(1, 1), torch.ones(1), torch.ones(1, 2))
    large = Increment(low(4, 1), torch.ones(1), torch.ones(1, 5))
    modules = {"small": small, "large": large, "same": unchanged(leading)}
    adapter = {name: low(3, 2) for name in modules}
    state = ServerState(
        5,
        adapter,
        leading=dict.fromkeys(modules, leading),
        changes={5: Change({}, modules)},
        last_seen={0: 5},
    )
    assert set(worth_keeping(state)[5].increments) == {"small", "same"}


def test_changes_since_a_round_are_all_or_none() -> None:
    state = state_with(CHANGES, {})
    found = changes_since(state, 3)
    assert found == [(4, CHANGES[4]), (5, CHANGES[5])]
    assert changes_since(state, 5) == []
    assert changes_since(state, 0) is None
    assert changes_since(state, None) is None


def test_sketches_tell_rounding_from_drift() -> None:
    x, other = low(3, 1), low(2, 2)
    told = sketch({"a": x}, {"a": other, "b": x})
    assert list(told) == ["a", "b"]
    assert all(len(numbers) == 4 for numbers in told.values())
    both = to_dense(x) + to_dense(other)
    assert agree(told, sketch({"b": x, "a": Dense(both.float())}))
    assert not agree(told, sketch({"a": Dense(both * 1.001), "b": x}))
    assert not agree(told, {"a": told["a"]})
    assert not agree(told, {**told, "c": [1.0, 0.0, 0.0, 0.0]})
    assert agree(told, {**told, "c": [0.0] * 4})
    assert not agree(told, {**told, "a": [1.0]})
    assert agree({}, {})

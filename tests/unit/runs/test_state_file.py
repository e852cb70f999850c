"""States as named tensors and back."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.federation.messages import ClientState
from fedlora.lowrank import Dense
from fedlora.methods.values import ServerState
from fedlora.runs.state_file import (
    clients_from_tensors,
    clients_to_tensors,
    settled,
    state_from_copies,
    state_to_tensors,
)
from support.checkpoint import a_state, assert_same


def test_names_say_where_a_tensor_belongs() -> None:
    assert state_to_tensors(a_state()).keys() == {
        "adapter/b.up/A",
        "adapter/b.up/B",
        "adapter/a.down/W",
        "base_delta/b.up/A",
        "base_delta/b.up/B",
        "last_merge/b.up/A",
        "last_merge/b.up/B",
        "momentum_products/b.up/A",
        "momentum_products/b.up/B",
        "momentum_factors/b.up/A",
        "dense/head.weight",
        "leading/b.up/A",
        "leading/b.up/B",
        "changes/rounds",
        "merges/0/b.up/A",  # that of round 1 is the last merge
        "merges/0/b.up/B",
        *(f"increments/0/b.up/{part}" for part in ("A", "B", "weights")),
        *(f"increments/1/b.up/{part}" for part in ("A", "B", "weights", "turn")),
    }


def test_what_compression_has_left_out_is_saved_too() -> None:
    state = replace(a_state(), unsent={"a.down": a_state().adapter["a.down"]})
    tensors = state_to_tensors(state)
    assert "unsent/a.down/W" in tensors
    assert_same(state_from_copies(tensors, 1, state.last_seen, state.ranks), settled(state))
    lost = {3: ClientState({"lost/A/b/up": torch.ones(2, 3), "b.up.B": torch.ones(4, 2)})}
    back = clients_from_tensors(clients_to_tensors(lost))
    assert back.keys() == lost.keys()
    assert back[3].factors.keys() == lost[3].factors.keys()


def test_a_settled_state_is_laid_out_as_one_that_was_saved_and_loaded() -> None:
    state = a_state()
    now = settled(state)
    assert_same(now, state)
    down = now.adapter["a.down"]
    assert isinstance(down, Dense)
    assert down.W.is_contiguous()  # it was a transpose
    loaded = state_from_copies(state_to_tensors(state), 1, state.last_seen, state.ranks)
    assert_same(loaded, now)
    assert list(loaded.adapter) == list(now.adapter)  # in one order: sums depend on it


def test_a_state_that_an_earlier_version_saved_knows_what_its_last_round_merged() -> None:
    saved = {
        name: value
        for name, value in state_to_tensors(a_state()).items()
        if name.split("/")[0] not in ("leading", "changes", "merges", "increments")
    }
    state = state_from_copies(saved, 1, {}, {})
    assert (state.leading, list(state.changes)) == ({}, [1])
    assert state.changes[1].merge is state.last_merge
    assert not state.changes[1].increments
    assert not state_from_copies({}, 0, {}, {}).changes


def test_settling_twice_changes_nothing_and_shares_nothing() -> None:
    once = settled(a_state())
    twice = settled(once)
    assert_same(once, twice)
    addresses = [
        {t.data_ptr() for t in state_to_tensors(s).values() if t.numel()} for s in (once, twice)
    ]
    assert not addresses[0] & addresses[1]


def test_clients_states_by_their_numbers() -> None:
    states = {
        10: ClientState({"a.down.B": torch.ones(2, 2).T}),
        2: ClientState({"b.up.B": torch.zeros(3, 1), "a.down.B": torch.ones(1)}),
    }
    tensors = clients_to_tensors(states)
    assert set(tensors) == {"10/a.down.B", "2/b.up.B", "2/a.down.B"}
    back = clients_from_tensors(tensors)
    assert list(back) == [2, 10]
    assert back[2].factors.keys() == states[2].factors.keys()
    assert torch.equal(back[10].factors["a.down.B"], torch.ones(2, 2))
    assert clients_from_tensors({}) == {}


def test_an_empty_state_has_no_tensors() -> None:
    assert state_to_tensors(ServerState(0, {})) == {}

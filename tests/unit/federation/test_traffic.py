"""Bytes a client lacks: what the seed gives it makes for itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

import pytest
import torch

from fedlora.federation.traffic import lacking
from fedlora.lowrank import Delta, LowRank
from fedlora.methods import METHODS
from fedlora.methods.tracking import unchanged
from fedlora.methods.values import Change, Increment, Prepared, ServerState
from fedlora.seeds import SERVER, Purpose, fresh_factors

SHAPES = {"m": (6, 8)}
"""Module -> (outputs, inputs)."""
RANK, FLOAT = 2, 4
FRESH = fresh_factors(0, 0, SERVER, Purpose.SHARED_INIT, SHAPES)
A_BYTES, B_BYTES = RANK * 8 * FLOAT, 6 * RANK * FLOAT


def initial() -> LowRank:
    return LowRank(FRESH("m", RANK), torch.zeros(6, RANK))


def bytes_down(state: ServerState, rule: str, held: int | None) -> int:
    """What a client lacks of the state's adapter and all that was merged."""
    sent = Prepared(state.adapter, {n: x for n, x in state.adapter.items() if is_low(x)})
    options = METHODS[rule].options()
    return lacking(state, sent, sent, METHODS[rule], options, FRESH, held).nbytes


def is_low(x: Delta) -> TypeGuard[LowRank]:
    return isinstance(x, LowRank)


def factors(rank: int) -> LowRank:
    return LowRank(torch.ones(rank, 8), torch.ones(6, rank))


def test_a_rule_that_sends_both_factors_pays_for_both() -> None:
    state = ServerState(round=1, adapter={"m": initial()})
    assert bytes_down(state, "fedit", 0) == A_BYTES + B_BYTES


def test_of_what_was_merged_a_client_lacks_what_came_since_or_the_whole_where_that_is_smaller() -> (
    None
):
    merged = {"m": factors(3), "other": factors(1)}
    changes = {
        2: Change({"m": factors(2)}),
        3: Change({"other": factors(1)}),
        4: Change({"m": factors(1)}),
    }
    state = ServerState(round=4, adapter={}, base_delta=merged, changes=changes)
    direction = (8 + 6) * FLOAT
    found = [bytes_down(state, "flora", held) for held in (4, 3, 2, 1, 0, None)]
    # The changes of rounds 2 and 4 together are as large as the whole; that of round 1 is gone.
    assert found == [size * direction for size in (0, 1, 2, 4, 4, 4)]


def test_of_an_adapter_that_clients_keep_they_lack_what_changed() -> None:
    whole, leading = factors(4), factors(2)
    increment = Increment(factors(1), torch.ones(2), torch.ones(2, 3))
    nothing = unchanged(leading)
    state = ServerState(
        round=3,
        adapter={"m": whole},
        leading={"m": leading},
        changes={2: Change({}, {"m": increment}), 3: Change({}, {"m": nothing})},
    )
    sent = Prepared(state.adapter, state.leading)
    rule, options = METHODS["exact"], METHODS["exact"].options()

    def down(of: ServerState, held: int | None) -> set[str]:
        return set(lacking(of, sent, sent, rule, options, FRESH, held).tensors)

    changed = {f"increment/2/m/{part}" for part in ("A", "B", "weights", "turn")}
    everything = {f"whole/m/{part}" for part in ("A", "B", "basis")}
    assert [down(state, held) for held in (3, 2, 1, 0, None)] == [
        set(),
        set(),
        changed,
        everything,
        everything,
    ]
    # A round whose increment is as large as the module, and was not kept for that.
    large = replace(state, changes={**state.changes, 2: Change({}, {})})
    assert down(large, 1) == everything
    longer = replace(state, changes={2: Change({}, {"m": replace(increment, stack=factors(5))})})
    assert down(replace(longer, round=2), 1) == everything


def test_the_head_is_sent_to_everybody() -> None:
    state = ServerState(round=1, adapter={}, dense={"head": torch.zeros(7)})
    assert [bytes_down(state, "flora", held) for held in (1, None)] == [7 * FLOAT] * 2


@pytest.mark.parametrize(
    ("rule", "bytes_once"),
    [
        ("ffa", 8 * FLOAT),  # A is never sent: its one row that the seed does not give
        ("fedsa", 6 * FLOAT),  # B is never sent: its one column that is not zero
        ("fedit", 0),  # both are sent to everybody in every round
    ],
)
def test_what_a_rule_never_sends_is_paid_for_once_beyond_the_seed(
    rule: str, bytes_once: int
) -> None:
    given = initial()  # the run goes on from an adapter
    given.A[1, 3] += 1
    given.B[4, 0] = 1
    state = ServerState(round=1, adapter={"m": given})
    assert bytes_down(state, rule, None) - bytes_down(state, rule, 0) == bytes_once


def test_what_the_seed_gives_costs_nothing() -> None:
    state = ServerState(round=1, adapter={"m": initial()})
    assert bytes_down(state, "ffa", None) == bytes_down(state, "ffa", 0)

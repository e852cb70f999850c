"""Bytes a client lacks: what the seed gives it makes for itself."""

from __future__ import annotations

import pytest
import torch

from fedlora.federation.traffic import bytes_down
from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from fedlora.methods.values import Prepared, ServerState
from fedlora.seeds import SERVER, Purpose, fresh_factors

SHAPES = {"m": (6, 8)}
"""Module -> (outputs, inputs)."""
RANK, FLOAT = 2, 4
FRESH = fresh_factors(0, 0, SERVER, Purpose.SHARED_INIT, SHAPES)
A_BYTES, B_BYTES = RANK * 8 * FLOAT, 6 * RANK * FLOAT


def initial() -> LowRank:
    return LowRank(FRESH("m", RANK), torch.zeros(6, RANK))


def test_a_rule_that_sends_both_factors_pays_for_both() -> None:
    adapter = {"m": initial()}
    down = bytes_down(
        ServerState(round=1, adapter=adapter),
        Prepared(adapter, adapter),
        METHODS["fedit"],
        FRESH,
        seen=True,
        new=False,
    )
    assert down == A_BYTES + B_BYTES


def test_a_client_that_was_away_lacks_all_that_was_merged() -> None:
    adapter = {"m": initial()}
    wide = {"m": LowRank(torch.zeros(5, 8), torch.zeros(6, 5))}
    last = {"m": LowRank(torch.zeros(1, 8), torch.zeros(6, 1))}
    state = ServerState(round=3, adapter=adapter, base_delta=wide, last_merge=last)
    sent = Prepared(adapter, adapter)
    away, there = (
        bytes_down(state, sent, METHODS["fedit"], FRESH, seen=seen, new=False)
        for seen in (False, True)
    )
    assert away - there == (5 - 1) * (8 + 6) * FLOAT


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
    adapter = {"m": given}
    state, sent = ServerState(round=0, adapter=adapter), Prepared(adapter, adapter)
    new, old = (
        bytes_down(state, sent, METHODS[rule], FRESH, seen=False, new=new) for new in (True, False)
    )
    assert new - old == bytes_once


def test_what_the_seed_gives_costs_nothing() -> None:
    adapter = {"m": initial()}
    state, sent = ServerState(round=0, adapter=adapter), Prepared(adapter, adapter)
    new, old = (
        bytes_down(state, sent, METHODS["ffa"], FRESH, seen=False, new=new) for new in (True, False)
    )
    assert new == old

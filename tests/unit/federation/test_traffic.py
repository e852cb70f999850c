"""Bytes a client lacks: what the seed gives it makes for itself."""

from __future__ import annotations

import torch

from fedlora.federation.traffic import beyond_seed, bytes_down, initial_factors
from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from fedlora.methods.values import Prepared, ServerState

SHAPES = {"m": (6, 8)}
"""Module -> (outputs, inputs)."""
RANK, FLOAT = 2, 4
FRESH = initial_factors(0, SHAPES)
A_BYTES, B_BYTES = RANK * 8 * FLOAT, 6 * RANK * FLOAT


def initial() -> LowRank:
    return LowRank(FRESH("m", RANK), torch.zeros(6, RANK))


def test_an_adapter_that_the_seed_gives_costs_nothing() -> None:
    assert beyond_seed({"m": initial()}, {"A", "B"}, FRESH) == 0


def test_only_rows_of_a_and_columns_of_b_that_differ_count() -> None:
    changed = initial()
    changed.A[1, 3] += 1
    changed.B[4, 0] = 1
    assert beyond_seed({"m": changed}, {"A"}, FRESH) == 8 * FLOAT
    assert beyond_seed({"m": changed}, {"B"}, FRESH) == 6 * FLOAT
    assert beyond_seed({"m": changed}, {"A", "B"}, FRESH) == (8 + 6) * FLOAT
    assert beyond_seed({"m": changed}, set(), FRESH) == 0


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


def test_the_frozen_factor_is_paid_for_once_and_only_beyond_the_seed() -> None:
    started = initial()
    started.A[0] += 1  # the run goes on from an adapter: the seed gives only the other row
    adapter = {"m": started}
    state, sent = ServerState(round=0, adapter=adapter), Prepared(adapter, adapter)
    new, old = (
        bytes_down(state, sent, METHODS["ffa"], FRESH, seen=False, new=new) for new in (True, False)
    )
    assert new - old == 8 * FLOAT

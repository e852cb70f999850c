"""Whole runs: spool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlora.federation.messages import ClientUpdate
from fedlora.federation.records import RoundRecord
from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from fedlora.methods.values import ServerState
from support.simulated import ranks_for, serve, train
from support.spool import assert_same, with_spool


def loose(update: ClientUpdate) -> ClientUpdate:
    """The same numbers as views into the middle of larger tensors, the other way round."""

    def view(t: Tensor) -> Tensor:
        held = torch.zeros(t.shape[1] + 3, t.shape[0] + 5, dtype=t.dtype)
        held[2:-1, 1:-4] = t.T
        return held[2:-1, 1:-4].T

    adapter = {n: LowRank(view(x.A), view(x.B)) for n, x in update.adapter.items()}
    return replace(update, adapter=adapter)


def run(
    method: str, spool: Path | None, order: Sequence[int], seed: int = 0, loosely: bool = False
) -> tuple[ServerState, list[RoundRecord]]:
    """Three rounds with a rejection, a divergence and a client that never answers in the second."""
    rule = METHODS[method]
    momentum = 0.5 if rule.server_optimiser and rule.server_momentum else 0.0
    ranks = [*ranks_for(rule), *ranks_for(rule)]
    server = with_spool(
        serve(method, ranks, server_momentum=momentum, dense={"head": torch.ones(3)}), spool
    )
    records = []
    for round in range(3):
        sent = server.plan()
        updates = {k: train(server, b, seed) for k, b in sent.items()}
        for k in order:
            update = replace(updates[k], dense={"head": torch.full((3,), k + 1.0)})
            if round == 1 and k == 3:
                server.reject(3, "lost")
            elif round == 1 and k == 5:
                assert server.accept(replace(update, dense={"head": torch.full((3,), math.nan)}))
            elif round != 1 or k != 6:
                assert server.accept(loose(update) if loosely else update) == ""
        records.append(server.commit())
    return server.state, records


ORDERS = [list(range(8)), list(range(7, -1, -1)), [4, 1, 7, 0, 2, 6, 3, 5]]


@pytest.mark.parametrize("method", METHODS)
def test_spool_order_and_layout_change_no_bit(method: str, tmp_path: Path) -> None:
    wanted, records = run(method, None, ORDERS[0])
    for order in ORDERS:
        for spool in (None, tmp_path / "spool"):
            for loosely in (False, True):
                found, told = run(method, spool, order, loosely=loosely)
                assert_same(found, wanted)
                assert told == records
    assert not [*tmp_path.rglob("*.safetensors")]

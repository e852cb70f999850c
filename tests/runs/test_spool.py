"""The order, the place and the memory layout of updates: none of them changes a bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass
class Played:
    """What three rounds have come to, and the updates that clients sent in each."""

    state: ServerState
    records: list[RoundRecord]
    updates: list[dict[int, ClientUpdate]]


def play(
    method: str,
    spool: Path | None,
    order: Sequence[int],
    loosely: bool = False,
    sent_before: Sequence[dict[int, ClientUpdate]] = (),
) -> Played:
    """Three rounds with a rejection, a divergence and a client that never answers in the second.

    Clients train, or send once more what they sent before.
    """
    rule = METHODS[method]
    momentum = 0.5 if rule.server_optimiser and rule.server_momentum else 0.0
    ranks = [*ranks_for(rule), *ranks_for(rule)]
    server = with_spool(
        serve(method, ranks, server_momentum=momentum, dense={"head": torch.ones(3)}), spool
    )
    records, sent_now = [], []
    for round in range(3):
        plan = server.plan()
        updates = (
            sent_before[round] if sent_before else {k: train(server, b) for k, b in plan.items()}
        )
        for k in order:
            update = replace(updates[k], dense={"head": torch.full((3,), k + 1.0)})
            if round == 1 and k == 3:
                server.reject(3, "lost")
            elif round == 1 and k == 5:
                assert server.accept(replace(update, dense={"head": torch.full((3,), math.nan)}))
            elif round != 1 or k != 6:
                assert server.accept(loose(update) if loosely else update) == ""
        records.append(server.commit())
        sent_now.append(updates)
    return Played(server.state, records, sent_now)


ORDERS = [list(range(8)), list(range(7, -1, -1)), [4, 1, 7, 0, 2, 6, 3, 5]]


@pytest.mark.parametrize("method", METHODS)
def test_spool_order_and_layout_change_no_bit(method: str, tmp_path: Path) -> None:
    wanted = play(method, None, ORDERS[0])
    for order in ORDERS:
        for spool in (None, tmp_path / "spool"):
            for loosely in (False, True):
                found = play(method, spool, order, loosely, wanted.updates)
                assert_same(found.state, wanted.state)
                assert found.records == wanted.records
    assert not [*tmp_path.rglob("*.safetensors")]

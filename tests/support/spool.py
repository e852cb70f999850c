"""Gives a server a spool, and compares states to the bit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.server import Server
from fedlora.lowrank import Deltas, Dense
from fedlora.methods.values import ServerState


def with_spool(server: Server, spool: Path | None) -> Server:
    return Server(server.federation, server.state, Mean(), spool)


def tensors(deltas: Deltas) -> dict[str, Tensor]:
    out = {}
    for name, x in deltas.items():
        parts = {"W": x.W} if isinstance(x, Dense) else {"A": x.A, "B": x.B}
        out |= {f"{name}.{key}": t for key, t in parts.items()}
    return out


def everything(state: ServerState) -> dict[str, Tensor]:
    parts = {"adapter": state.adapter, "base": state.base_delta, "merge": state.last_merge}
    parts["momentum"] = state.momentum.products
    out = {f"{key}/{n}": t for key, x in parts.items() for n, t in tensors(x).items()}
    out |= {f"factors/{n}": t for n, t in state.momentum.factors.items()}
    return out | {f"dense/{n}": t for n, t in state.dense.items()}


def assert_same(one: ServerState, other: ServerState) -> None:
    mine, theirs = everything(one), everything(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (one.ranks, one.last_seen) == (other.ranks, other.last_seen)

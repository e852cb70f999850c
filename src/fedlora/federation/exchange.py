"""Computes what both sides make of a message, by pure functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedlora.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlora.lowrank import Deltas, LowRank, add_all, concat, prefix, wide
from fedlora.methods.rule import Rule, Shapes
from fedlora.methods.values import ServerState, Start
from fedlora.seeds import Purpose, fresh_factors


def global_delta(state: ServerState) -> Deltas:
    """The global model's difference from the base, `base_delta + adapter`."""
    return add_all([state.base_delta, state.adapter])


def client_start(
    broadcast: Broadcast,
    rule: Rule,
    options: Any,
    shapes: Shapes,
    seed: int,
    own: ClientState | None = None,
) -> Start:
    """What client k makes of its broadcast, by the rule; a pure function, run on both sides.

    What a client keeps for itself (`own`) it alone can put in; the server's start is without it.
    """
    fresh = fresh_factors(seed, broadcast.round, broadcast.client, Purpose.CLIENT_INIT, shapes)
    start = rule.start(broadcast.adapter, broadcast.leading, shapes, broadcast.rank, fresh, options)
    if own is not None:
        kept = {n: own.factors.get(f"{n}.B", x.B) for n, x in start.adapter.items()}
        start = replace(start, adapter={n: LowRank(x.A, kept[n]) for n, x in start.adapter.items()})
    if broadcast.modules is None:
        return start
    frozen, trained = dict(start.own), dict(start.adapter)
    for name in start.adapter.keys() - broadcast.modules:
        x = trained.pop(name)
        if name in start.beneath:  # there `own` is what the adapter takes off it
            frozen.pop(name)
        else:
            frozen[name] = concat([frozen[name], x]) if name in frozen else x
    return Start(trained, frozen, start.beneath)


def received(update: ClientUpdate, start: Start) -> dict[str, LowRank]:
    """A client's factors as the server knows them: what is not sent is what it started from."""
    out = {}
    for name, x in update.adapter.items():
        began = prefix(start.adapter[name], x.rank)
        a, b = wide(x.A), wide(x.B)
        out[name] = LowRank(
            a if "A" in update.sends else began.A.to(a), b if "B" in update.sends else began.B.to(b)
        )
    return out

"""Hands on the leading directions of the sum and merges the others (FedMomentum).

    S = adapter + sum_k p_k (s_k B_k A_k - start_k) = U diag(s) V^T
    next adapter: the first r directions, balanced        merged: the others

so that nothing is lost and clients go on where the global model has moved most. A client of rank
r_k < r trains the first r_k directions and holds the others frozen; missing ones are fresh.

Yan et al., arXiv 2603.08014.

Exact when: always, for every mix of ranks.
"""

from __future__ import annotations

from typing import Any

from fedlora.lowrank import (
    Adapter,
    Delta,
    Deltas,
    LowRank,
    add_all,
    balance,
    drop_null_directions,
    prefix,
    subtract,
    suffix,
    top,
    zeros,
)
from fedlora.methods.rule import Fresh, Rule, Shapes
from fedlora.methods.shared import fill, product_change, whole
from fedlora.methods.values import Aggregate, Encoded, Prepared, ServerState, Start
from fedlora.threads import map_modules


def _split(deltas: Deltas, rank: int) -> Aggregate:
    """The leading directions of every module to be trained, the others to be merged."""
    adapter: dict[str, Delta] = {}
    beyond: dict[str, Delta] = {}
    for name, x in map_modules(drop_null_directions, deltas).items():
        kept = top(x, rank)
        adapter[name] = balance(kept)
        if x.rank > rank:
            beyond[name] = suffix(x, rank) if isinstance(x, LowRank) else subtract(x, kept)
    return Aggregate(adapter, beyond)


def _initial(shapes: Shapes, rank: int, fresh: Fresh, given: Adapter) -> tuple[Deltas, Deltas]:
    parts = _split(given, rank)
    return parts.adapter, parts.merge


def _broadcast(state: ServerState, rank: int, options: Any) -> Prepared:
    leading = {name: x for name, x in state.adapter.items() if isinstance(x, LowRank)}
    return Prepared(leading, leading)


def _client_init(
    adapter: Deltas, leading: Adapter, shapes: Shapes, rank: int, fresh: Fresh, options: Any
) -> Start:
    trained: dict[str, LowRank] = {}
    beyond: dict[str, LowRank] = {}
    for name, shape in shapes.items():
        sent = leading.get(name, zeros(shape))
        trained[name] = fill(prefix(sent, rank), fresh(name, rank)[sent.rank :])
        if sent.rank > rank:
            beyond[name] = suffix(sent, rank)
    return Start(trained, beyond)


def _finalize(total: Encoded, state: ServerState, rank: int, options: Any) -> Aggregate:
    return _split(add_all([state.adapter, total.products]), rank)


RULE = Rule(
    name="fedmomentum",
    title="train on the leading directions of the sum, merge the others",
    paper="Yan et al., arXiv 2603.08014",
    exact_when="always",
    mixed_ranks=True,
    downlink="the leading directions, and what the round before merged",
    secure_sum="products",
    sums_learnt=True,
    feedback="product",
    initial=_initial,
    broadcast=_broadcast,
    for_rank=whole,
    client_init=_client_init,
    encode=product_change,
    finalize=_finalize,
)

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
    compact,
    leading,
    prefix,
    subtract,
    suffix,
)
from fedlora.methods.rule import Fresh, Rule, Shapes
from fedlora.methods.shared import change, fill, whole
from fedlora.methods.values import Aggregate, Encoded, Prepared, ServerState, Start
from fedlora.threads import each


def _split(deltas: Deltas, rank: int) -> Aggregate:
    adapter: dict[str, Delta] = {}
    beyond: dict[str, Delta] = {}
    for name, x in each(compact, deltas).items():
        top = prefix(x, rank) if isinstance(x, LowRank) else leading(x, rank)
        adapter[name] = balance(top)
        if x.rank > rank:
            beyond[name] = suffix(x, rank) if isinstance(x, LowRank) else subtract(x, top)
    return Aggregate(adapter, beyond)


def _initial(shapes: Shapes, rank: int, fresh: Fresh, given: Adapter) -> tuple[Deltas, Deltas]:
    found = _split(given, rank)
    return found.adapter, found.merge


def _prepare(state: ServerState, rank: int, options: Any) -> Prepared:
    leading = {name: x for name, x in state.adapter.items() if isinstance(x, LowRank)}
    return Prepared(leading, leading)


def _start(
    adapter: Deltas, leading: Adapter, shapes: Shapes, rank: int, fresh: Fresh, options: Any
) -> Start:
    trained: dict[str, LowRank] = {}
    rest: dict[str, LowRank] = {}
    for name, (m, _) in shapes.items():
        a = fresh(name, rank)
        top = leading.get(name, LowRank(a[:0], a.new_zeros(m, 0)))
        trained[name] = fill(prefix(top, rank), a[top.rank :])
        if top.rank > rank:
            rest[name] = suffix(top, rank)
    return Start(trained, rest)


def _encode(update: Adapter, start: Start, state: ServerState, options: Any) -> Encoded:
    return Encoded(products=change(update, start.adapter))


def _finish(total: Encoded, state: ServerState, rank: int, options: Any) -> Aggregate:
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
    initial=_initial,
    prepare=_prepare,
    cut=whole,
    start=_start,
    encode=_encode,
    finish=_finish,
)

"""Holds the pieces that several aggregation rules are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedlora.lowrank import (
    Adapter,
    Delta,
    Deltas,
    LowRank,
    add,
    add_all,
    balance,
    prefix,
    refactor,
    suffix,
    zeros,
)
from fedlora.methods.rule import Fresh, Rule, Shapes
from fedlora.methods.values import (
    Aggregate,
    Encoded,
    Prepared,
    RoundNumbers,
    ServerState,
    Start,
)


def whole(prepared: Prepared, rank: int, options: Any) -> Prepared:
    """Everyone is sent the same."""
    return prepared


def fresh_start(shapes: Shapes, rank: int, fresh: Fresh) -> dict[str, LowRank]:
    """LoRA's initialisation for every module: `A (rank, n)` random, `B (m, rank)` zero."""
    return {name: fill(zeros(shape), fresh(name, rank)) for name, shape in shapes.items()}


def fill(x: LowRank, a: Tensor) -> LowRank:
    """`x` with the directions of `A = a (j, n)`, `B = 0` appended: the same update, rank r + j."""
    a = a.to(x.A)
    return LowRank(torch.cat([x.A, a]), torch.cat([x.B, x.B.new_zeros(x.B.shape[0], len(a))], 1))


def change(update: Adapter, start: Adapter) -> dict[str, Delta]:
    """`M_k - M_k_start` for every module: what a client learnt, as products.

    Args:
        update: the factors that a client ended with.
        start: those it began with, of higher rank where it has pruned.
    """
    out: dict[str, Delta] = {}
    for name, trained in update.items():
        began = start[name]
        used = began.B.any(dim=0)  # directions that begin with B = 0 contribute nothing
        out[name] = add([trained, LowRank(began.A[used], -began.B[:, used])])
    return out


def shared_initial(
    shapes: Shapes, rank: int, fresh: Fresh, given: Adapter
) -> tuple[Deltas, Deltas]:
    """One random `A` for all (independent draws would average to nothing), `B = 0`.

    A given adapter is continued: its leading `rank` directions are trained on, filled up with
    fresh ones where it has fewer, and what it has beyond them is merged.
    """
    adapter, beyond = dict(fresh_start(shapes, rank, fresh)), {}
    for name, x in given.items():
        exact = refactor(x)
        x = balance(prefix(exact, rank))
        if exact.rank > rank:
            beyond[name] = suffix(exact, rank)
        adapter[name] = fill(x, fresh(name, rank)[x.rank :])
    return adapter, beyond


def broadcast_factors(state: ServerState, rank: int, options: Any) -> Prepared:
    """The global adapter itself, held as factors."""
    leading = {n: x for n, x in state.adapter.items() if isinstance(x, LowRank)}
    assert len(leading) == len(state.adapter), "a rule that averages factors keeps factors"
    return Prepared(leading, leading)


def cut_to_rank(prepared: Prepared, rank: int, options: Any) -> Prepared:
    """The first `rank` directions: what a client of that rank trains."""
    leading = {name: prefix(x, rank) for name, x in prepared.leading.items()}
    return Prepared(leading, leading, prepared.error)


def prefix_start(
    adapter: Deltas, leading: Adapter, shapes: Shapes, rank: int, fresh: Fresh, options: Any
) -> Start:
    """The first `rank` directions of the shared adapter; what lies beyond them is not seen."""
    return Start({name: prefix(leading[name], rank) for name in shapes})


def whole_start(
    adapter: Deltas, leading: Adapter, shapes: Shapes, rank: int, fresh: Fresh, options: Any
) -> Start:
    """The first `rank` directions of the shared adapter, the others frozen beside them."""
    trained = {name: prefix(leading[name], rank) for name in shapes}
    beyond = {name: suffix(leading[name], rank) for name in shapes if leading[name].rank > rank}
    return Start(trained, beyond)


def product_change(update: Adapter, start: Start, numbers: RoundNumbers, options: Any) -> Encoded:
    """`M_k - M_k_start`, what a client learnt, as products."""
    return Encoded(products=change(update, start.adapter))


def factor_change(update: Adapter, start: Start, numbers: RoundNumbers, options: Any) -> Encoded:
    """`A_k - A_k_start` and `B_k - B_k_start`, zero where a client has no such direction.

    What a client does not train does not change: neither a direction beyond its rank, nor a module
    that is not in `update`.
    """
    factors: dict[str, Tensor] = {}
    for name, trained in update.items():
        began, width = prefix(start.adapter[name], trained.rank), numbers.widths[name]
        a = began.A.new_zeros(width, began.A.shape[1])
        b = began.B.new_zeros(began.B.shape[0], width)
        a[: trained.rank] = trained.A - began.A  # (r, n)
        b[:, : trained.rank] = trained.B - began.B  # (m, r)
        factors[f"{name}.A"], factors[f"{name}.B"] = a, b
    return Encoded(factors)


def factor_and_product_change(
    update: Adapter, start: Start, numbers: RoundNumbers, options: Any
) -> Encoded:
    """The change of the factors, and the change of their product."""
    return Encoded(
        factor_change(update, start, numbers, options).factors,
        product_change(update, start, numbers, options).products,
    )


def present(name: str) -> str:
    """The key, among an encoded update's weights, of the directions that a client has."""
    return f"{name}#present"


def padded_change(update: Adapter, start: Start, numbers: RoundNumbers, options: Any) -> Encoded:
    """`factor_change`, and by how much weight each module and each of its directions was trained.

    With the weights, `shift_to_zeros` makes of it `pad(A_k) - A`: the factors padded with zeros, as
    a change of the global ones.
    """
    weights: dict[str, Tensor] = {}
    for name, trained in update.items():
        weights[name] = start.adapter[name].A.new_ones(())
        weights[present(name)] = start.adapter[name].A.new_zeros(numbers.widths[name])
        weights[present(name)][: trained.rank] = 1.0
    return replace(factor_change(update, start, numbers, options), weights=weights)


def shift_to_zeros(encoded: Encoded, state: ServerState, options: Any) -> Encoded:
    """What takes a direction to zero at those who train its module, but not the direction.

    `-sum_(k: r_k <= j) w_k A[j]` and the same of B for every direction j, from the weights of
    `padded_change`: who has no direction j counts with zeros in its place.
    """
    factors: dict[str, Tensor] = {}
    for name, current in state.adapter.items():
        if name not in encoded.weights:
            continue
        assert isinstance(current, LowRank)
        absent = encoded.weights[name] - encoded.weights[present(name)]  # (r,)
        factors[f"{name}.A"] = current.A * -absent[:, None]
        factors[f"{name}.B"] = current.B * -absent
    return Encoded(factors)


def with_shift(rule: Rule, encoded: Encoded, state: ServerState, options: Any) -> Encoded:
    """An encoded update, or a weighted sum of them, with what the server has to add to it."""
    if rule.shift is None:
        return encoded
    added = rule.shift(encoded, state, options)
    factors = {
        name: value + added.factors[name] if name in added.factors else value
        for name, value in encoded.factors.items()
    }
    return replace(encoded, factors=factors, products=add_all([encoded.products, added.products]))


def add_factors(total: Encoded, state: ServerState, rank: int, options: Any) -> Aggregate:
    """`A + sum.A`, `B + sum.B`; a module that nobody trained stays."""
    adapter = {}
    for name, current in state.adapter.items():
        assert isinstance(current, LowRank)
        if f"{name}.A" not in total.factors:
            adapter[name] = current
            continue
        adapter[name] = LowRank(
            current.A + total.factors[f"{name}.A"], current.B + total.factors[f"{name}.B"]
        )
    return Aggregate(adapter)

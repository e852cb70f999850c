"""Holds the pieces that several aggregation rules are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlora.lowrank import Adapter, Delta, Deltas, LowRank, add, balance, prefix, refactor, suffix
from fedlora.methods.rule import Fresh, Shapes
from fedlora.methods.values import Aggregate, Encoded, Prepared, ServerState, Start


def whole(prepared: Prepared, rank: int, options: Any) -> Prepared:
    """Everyone is sent the same."""
    return prepared


def fresh_start(shapes: Shapes, rank: int, fresh: Fresh) -> dict[str, LowRank]:
    """LoRA's initialisation for every module: `A (rank, n)` random, `B (m, rank)` zero."""
    out = {}
    for name, (m, _) in shapes.items():
        a = fresh(name, rank)
        out[name] = LowRank(a, a.new_zeros(m, rank))
    return out


def fill(x: LowRank, a: Tensor) -> LowRank:
    """`x` with the directions of `A = a (j, n)`, `B = 0` appended: the same update, rank r + j."""
    a = a.to(x.A)
    return LowRank(torch.cat([x.A, a]), torch.cat([x.B, x.B.new_zeros(x.B.shape[0], len(a))], 1))


def change(update: Adapter, start: Adapter) -> dict[str, Delta]:
    """`M_k - M_k_start` for every module: what a client learnt, as products."""
    out: dict[str, Delta] = {}
    for name, trained in update.items():
        began = start[name]  # of higher rank where the client has pruned
        moved = began.B.any(dim=0)  # directions that begin with B = 0 contribute nothing
        out[name] = add([trained, LowRank(began.A[moved], -began.B[:, moved])])
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


def prepare_as_is(state: ServerState, rank: int, options: Any) -> Prepared:
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


def change_of_factors(
    update: Adapter, start: Start, state: ServerState, options: Any
) -> dict[str, Tensor]:
    """`A_k - start.A`, `B_k - start.B`, with zeros where a client has no such direction.

    Unlike `padded_change` nothing is diluted: what a client does not train does not change.
    """
    factors: dict[str, Tensor] = {}
    for name, trained in update.items():
        current, began = state.adapter[name], start.adapter[name]
        assert isinstance(current, LowRank)
        a, b = torch.zeros_like(current.A), torch.zeros_like(current.B)
        a[: trained.rank] = trained.A - began.A  # (r, n)
        b[:, : trained.rank] = trained.B - began.B  # (m, r)
        factors[f"{name}.A"], factors[f"{name}.B"] = a, b
    return factors


def padded_change(update: Adapter, start: Start, state: ServerState, options: Any) -> Encoded:
    """`pad(A_k) - A`, `pad(B_k) - B`: factors padded with zeros to the global rank, as a change.

    A module that the client does not train is not in `update`, and does not change.
    """
    factors: dict[str, Tensor] = {}
    for name, trained in update.items():
        current = state.adapter[name]
        assert isinstance(current, LowRank)
        a, b = -current.A, -current.B
        a[: trained.rank] += trained.A  # (r, n)
        b[:, : trained.rank] += trained.B  # (m, r)
        factors[f"{name}.A"], factors[f"{name}.B"] = a, b
    return Encoded(factors=factors)


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

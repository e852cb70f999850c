"""Sums products, and hands every client the directions that its rank affords (FlexLoRA).

    S' = sum_k p_k s_k B_k A_k = U diag(s) V^T
    start_k = U[:, :r_k] diag(s[:r_k]) V[:, :r_k]^T

The sum is the global model; what a client's rank does not hold is dropped at that client, and with
it from what it contributes next. Nothing is m x n: the sum is refactored (QR and a small SVD).

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, arXiv 2402.11505.

Exact when no client drops anything: in the first round, and while every r_k is at least the rank
of S.
"""

from __future__ import annotations

from typing import Any

from fedlora.lowrank import (
    Adapter,
    Delta,
    Deltas,
    LowRank,
    add,
    balance,
    cheaper_form,
    concat,
    drop_null_directions,
    merge_equal_rows,
    prefix,
    scale,
    top,
    zeros,
)
from fedlora.methods.rule import Fresh, Rule, Shapes
from fedlora.methods.shared import cut_to_rank, fill
from fedlora.methods.values import Aggregate, Encoded, Prepared, RoundNumbers, ServerState, Start
from fedlora.threads import map_modules


def global_sum(shapes: Shapes, rank: int, fresh: Fresh, given: Adapter) -> tuple[Deltas, Deltas]:
    """The given adapter in the form of `refactor`, or nothing."""
    return {name: drop_null_directions(x) for name, x in given.items()}, {}


def leading_directions(state: ServerState, rank: int, options: Any) -> Prepared:
    """The leading directions of S that the largest rank affords."""
    leading = map_modules(lambda x: top(x, rank), state.adapter)
    return Prepared(leading, leading)


def top_start(
    adapter: Deltas, leading: Adapter, shapes: Shapes, rank: int, fresh: Fresh, options: Any
) -> Start:
    """The leading directions, balanced, and fresh ones where S has fewer; nothing is frozen."""
    trained = {}
    for name, shape in shapes.items():
        continued = balance(prefix(leading.get(name, zeros(shape)), rank))
        trained[name] = fill(continued, fresh(name, rank)[continued.rank :])
    return Start(trained)


def _encode(update: Adapter, start: Start, numbers: RoundNumbers, options: Any) -> Encoded:
    """`M_k`, the product a client ended with: S is not at the clients, to be subtracted there."""
    return Encoded(
        products={name: cheaper_form(x) for name, x in update.items()},
        weights={name: x.A.new_ones(()) for name, x in update.items()},
    )


def _shift(encoded: Encoded, state: ServerState, options: Any) -> Encoded:
    """`-S`, by the weight of those who train the module: the sum is one of changes, `M_k - S`."""
    return Encoded(
        products={
            name: scale(whole, -float(encoded.weights[name]))
            for name, whole in state.adapter.items()
            if name in encoded.weights
        }
    )


def _finalize(total: Encoded, state: ServerState, rank: int, options: Any) -> Aggregate:
    """S + sum, which is the sum of the products: with weights that sum to one S drops out of it."""
    sums: dict[str, Delta] = {}
    for name, x in total.products.items():
        whole = state.adapter.get(name)
        if isinstance(whole, LowRank) and isinstance(x, LowRank):
            sums[name] = merge_equal_rows(concat([whole, x]))
        else:
            sums[name] = x if whole is None else add([whole, x])
    return Aggregate({**state.adapter, **map_modules(drop_null_directions, sums)})


RULE = Rule(
    name="flexlora",
    title="sum the products, give every client the leading directions its rank affords",
    paper="Bai et al., NeurIPS 2024, arXiv 2402.11505",
    exact_when="no rank is below that of the global update (the first round, for example)",
    mixed_ranks=True,
    downlink="the leading r_k directions",
    secure_sum="products",
    feedback="product",
    initial=global_sum,
    broadcast=leading_directions,
    for_rank=cut_to_rank,
    client_init=top_start,
    encode=_encode,
    shift=_shift,
    finalize=_finalize,
)

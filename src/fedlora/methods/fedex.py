"""Averages A and B, and merges into the base what the average misses (FedEx-LoRA).

    A = sum_k p_k A_k        B = sum_k p_k s_k B_k        merged: sum_k p_k s_k B_k A_k - B A

With mixed ranks a client trains the first r_k directions and holds the tail, what the global
adapter has beyond them, frozen beside it; the tail counts as the client's own in both sums:

    merged: sum_k p_k (s_k B_k A_k + tail_k) - B A

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models", ACL 2025, arXiv 2410.09432; mixed ranks are this project's.

Exact when: always, for every mix of ranks.
"""

from __future__ import annotations

from typing import Any

from fedlora.lowrank import add_all, drop_null_directions, scale_all
from fedlora.methods.rule import Rule
from fedlora.methods.shared import (
    add_factors,
    broadcast_factors,
    factor_and_product_change,
    shared_initial,
    whole,
    whole_start,
)
from fedlora.methods.values import Aggregate, Encoded, ServerState
from fedlora.threads import map_modules


def _finalize(total: Encoded, state: ServerState, rank: int, options: Any) -> Aggregate:
    after = add_factors(total, state, rank, options).adapter
    # sum_k p_k (M_k + tail_k) - B A, as a change: the wanted one less the one of the averages.
    averaged = add_all([after, scale_all(state.adapter, -1.0)])
    wanted = total.products
    merge = add_all([wanted, scale_all({n: x for n, x in averaged.items() if n in wanted}, -1.0)])
    return Aggregate(after, map_modules(drop_null_directions, merge))


RULE = Rule(
    name="fedex",
    title="average A and B, merge the residual",
    paper="Singhal et al., ACL 2025, arXiv 2410.09432; mixed ranks by this project",
    exact_when="always",
    mixed_ranks=True,
    downlink="A, B and the residual of the round before",
    secure_sum="factors and products",
    sums_learnt=True,
    initial=shared_initial,
    broadcast=broadcast_factors,
    for_rank=whole,
    client_init=whole_start,
    encode=factor_and_product_change,
    finalize=_finalize,
)

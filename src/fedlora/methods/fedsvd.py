"""Averages B under an orthonormal A that each round takes from the global product (FedSVD).

    B = sum_k p_k s_k B_k        B A = U diag(s) V^T        next: A = V^T, B = U diag(s)

A is common to all clients within a round, so the mean of B is the mean of the products. The rows
of A span what they spanned at first, as FFA-LoRA's do; within that span they follow the data.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
NeurIPS 2025, arXiv 2505.12805. Its code begins with LoRA's random A; ours is orthonormal from the
first round on.

Exact when: always (all clients have one rank).
"""

from __future__ import annotations

from typing import Any

import torch

from fedlora.lowrank import Adapter, Delta, Deltas, LowRank
from fedlora.methods.rule import Fresh, Rule, Shapes
from fedlora.methods.shared import (
    add_factors,
    broadcast_factors,
    factor_change,
    prefix_start,
    shared_initial,
    whole,
)
from fedlora.methods.values import Aggregate, Encoded, ServerState, Training
from fedlora.threads import one_thread


def orthonormal(x: LowRank) -> LowRank:
    """The same `B A` of the same rank r: rows of A orthonormal (r <= n), columns of B orthogonal.

    `A^T = Q R`, `B R^T = U diag(s) W`; `A = W Q^T`, `B = U diag(s)`. Unlike `refactor` it keeps
    directions in which B is zero, so that they can be trained.
    """
    with one_thread():
        q, r = torch.linalg.qr(x.A.T)  # (n, j), (j, r) with j = min(n, r)
        left, values, right = torch.linalg.svd(x.B @ r.T, full_matrices=False)
        a, b = right @ q.T, left * values
        if len(a) < x.rank:  # more directions than the layer is wide or high
            spare, _ = torch.linalg.qr(torch.cat([a, x.A]).T)  # (n, .): orthonormal, a's span first
            more = spare.T[len(a) : x.rank]
            missing = x.rank - len(a) - len(more)
            a = torch.cat([a, more, more.new_zeros(missing, a.shape[1])])
            b = torch.cat([b, b.new_zeros(b.shape[0], x.rank - b.shape[1])], 1)
    return LowRank(a, b)


def _initial(shapes: Shapes, rank: int, fresh: Fresh, given: Adapter) -> tuple[Deltas, Deltas]:
    adapter, beyond = shared_initial(shapes, rank, fresh, given)
    return _orthonormal(adapter), beyond


def _orthonormal(adapter: Deltas) -> dict[str, Delta]:
    out: dict[str, Delta] = {}
    for name, x in adapter.items():
        assert isinstance(x, LowRank)
        out[name] = orthonormal(x)
    return out


def _finalize(total: Encoded, state: ServerState, rank: int, options: Any) -> Aggregate:
    return Aggregate(_orthonormal(add_factors(total, state, rank, options).adapter))


RULE = Rule(
    name="fedsvd",
    title="average B under an orthonormal A that is taken from the global product each round",
    paper="Lee et al., NeurIPS 2025, arXiv 2505.12805",
    exact_when="always",
    mixed_ranks=False,
    downlink="A and B",
    secure_sum="factors",
    feedback="none",
    initial=_initial,
    broadcast=broadcast_factors,
    for_rank=whole,
    client_init=prefix_start,
    encode=factor_change,
    finalize=_finalize,
    training=lambda options: Training(trains=("B",)),
    server_momentum=False,
    one_shot=False,
)

"""Averages A and B, and corrects B towards the mean of the products (LoRA-FAIR).

    A = sum_k p_k A_k        B = sum_k p_k s_k B_k        W = sum_k p_k s_k B_k A_k
    D = argmin_D ||W - (B + D) A||_F^2 + lambda ||D||_F^2 = (W - B A) A^T (A A^T + lambda I)^-1

and clients go on from A and B + D. Nothing is m x n: `W A^T` is a sum of products of factors.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
ICCV 2025, arXiv 2411.14961. The paper weighs a cosine similarity against the size of the
correction; this is the least-squares form, solved exactly, in which lambda is another scale.

Exact when all clients end with the same A, or all with the same B; else, at lambda = 0, as near as
a matrix with A's row space can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedlora.lowrank import Delta, LowRank, add
from fedlora.methods.rule import Rule, bounded, check_bounds
from fedlora.methods.shared import (
    add_factors,
    broadcast_factors,
    factor_and_product_change,
    prefix_start,
    shared_initial,
    whole,
)
from fedlora.methods.values import Aggregate, Encoded, ServerState
from fedlora.threads import one_thread


@dataclass(frozen=True)
class Options:
    """Keys of the rule.

    Args:
        correction_penalty: lambda, which keeps the correction of B small.
    """

    correction_penalty: float = bounded(0.01, ge=0)

    def __post_init__(self) -> None:
        check_bounds(self)


def _times(x: Delta, right: torch.Tensor) -> torch.Tensor:
    """`dW @ right` with right `(n, j)`: `(m, j)`."""
    if isinstance(x, LowRank):
        return x.B.to(right) @ (x.A.to(right) @ right)
    return x.W.to(right) @ right


def correction(wanted: Delta, mean: LowRank, penalty: float) -> torch.Tensor:
    """D `(m, r)` of the formula above, by the pseudo-inverse where there is no inverse."""
    with one_thread():
        gram = mean.A @ mean.A.T + penalty * torch.eye(mean.rank).to(mean.A)  # (r, r)
        missed: torch.Tensor = _times(wanted, mean.A.T) - mean.B @ (mean.A @ mean.A.T)  # (m, r)
        inverse: torch.Tensor = torch.linalg.pinv(gram, hermitian=True)
        return missed @ inverse


def _finalize(total: Encoded, state: ServerState, rank: int, options: Options) -> Aggregate:
    adapter: dict[str, Delta] = {}
    for name, x in add_factors(total, state, rank, options).adapter.items():
        assert isinstance(x, LowRank)
        adapter[name] = x
        if name in total.products:
            wanted = add([state.adapter[name], total.products[name]])
            adapter[name] = LowRank(x.A, x.B + correction(wanted, x, options.correction_penalty))
    return Aggregate(adapter)


RULE = Rule(
    name="lora_fair",
    title="average A and B, correct B towards the mean of the products",
    paper="Bian et al., ICCV 2025, arXiv 2411.14961",
    exact_when="all clients end with the same A, or all with the same B",
    mixed_ranks=False,
    downlink="A and B",
    secure_sum="factors and products",
    sums_learnt=True,
    initial=shared_initial,
    broadcast=broadcast_factors,
    for_rank=whole,
    client_init=prefix_start,
    encode=factor_and_product_change,
    finalize=_finalize,
    options=Options,
)

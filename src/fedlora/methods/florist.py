"""Stacks all adapters and merges the directions that hold most of the energy (FLoRIST).

    dW = sum_k p_k (s_k B_k A_k - start_k) = U S V^T
    merged: the fewest leading directions p with  sum_(i <= p) S_i^2 >= tau sum_i S_i^2

The rest is dropped, and clients start afresh, as with FLoRA; the broadcast is smaller than its.

Ramesh and Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated
Fine-Tuning of Large Language Models", MLSys 2026, arXiv 2506.09199.

Exact when tau = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.lowrank import Delta, LowRank, truncate
from fedlora.methods import flora
from fedlora.methods.rule import Rule, bounded, check_bounds
from fedlora.methods.shared import whole
from fedlora.methods.values import Aggregate, Encoded, ServerState
from fedlora.threads import map_modules


@dataclass(frozen=True)
class Options:
    """Keys of the rule.

    Args:
        energy_threshold: tau, the share of the squared singular values that is kept; 1 keeps all.
    """

    energy_threshold: float = bounded(0.9, gt=0, le=1)

    def __post_init__(self) -> None:
        check_bounds(self)


def _finalize(total: Encoded, state: ServerState, rank: int, options: Options) -> Aggregate:
    if options.energy_threshold == 1.0:
        return Aggregate(adapter={}, merge=total.products)

    def kept(x: Delta) -> LowRank:
        return truncate(x, energy=options.energy_threshold)[0]

    return Aggregate(adapter={}, merge=map_modules(kept, total.products))


RULE = Rule(
    name="florist",
    title="stack all adapters, merge the directions that hold most of the energy, start afresh",
    paper="Ramesh and Dass, MLSys 2026, arXiv 2506.09199",
    exact_when="tau = 1",
    mixed_ranks=True,
    downlink="the directions kept of the round before",
    secure_sum="products",
    sums_learnt=True,
    feedback="product",
    initial=flora.RULE.initial,
    broadcast=flora.RULE.broadcast,
    for_rank=whole,
    client_init=flora.RULE.client_init,
    encode=flora.RULE.encode,
    finalize=_finalize,
    options=Options,
)

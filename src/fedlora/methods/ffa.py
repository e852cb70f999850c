"""Freezes one A that all clients share, and averages B (FFA-LoRA).

    A: one random draw, the same for all, never trained        B = sum_k p_k s_k B_k

With A common, the mean of B is the mean of the products: `sum_k p_k B_k A`. Only B travels, up and
down; A follows from the seed, and is sent once where the run goes on from an adapter. A client of
rank r_k < r trains the first r_k columns of B, and its change counts as zero in the others
(padding).

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.

Exact when: always, for every mix of ranks.
"""

from __future__ import annotations

from fedlora.methods.rule import Rule
from fedlora.methods.shared import (
    add_factors,
    broadcast_factors,
    cut_to_rank,
    factor_change,
    prefix_start,
    shared_initial,
)
from fedlora.methods.values import Training

RULE = Rule(
    name="ffa",
    title="freeze one shared A, average B",
    paper="Sun et al., ICLR 2024, arXiv 2403.12313",
    exact_when="always",
    mixed_ranks=True,
    downlink="the first r_k columns of B; A follows from the seed (that of an adapter: once)",
    secure_sum="factors",
    initial=shared_initial,
    broadcast=broadcast_factors,
    for_rank=cut_to_rank,
    client_init=prefix_start,
    encode=factor_change,
    finalize=add_factors,
    training=lambda options: Training(trains=("B",)),
    sent_down=lambda round, seen: "B",
    one_shot=False,
)

"""Averages A and B separately (FedIT).

    A = sum_k p_k A_k        B = sum_k p_k s_k B_k

The global update is `B A`, whose cross terms `p_j p_k B_j A_k` no client trained. Clients continue
from the average.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
arXiv 2305.05644.

Exact when all clients end with the same A, or all with the same B (one client, for example).
"""

from __future__ import annotations

from fedlora.methods.rule import Rule
from fedlora.methods.shared import (
    add_factors,
    broadcast_factors,
    factor_change,
    prefix_start,
    shared_initial,
    whole,
)

RULE = Rule(
    name="fedit",
    title="average A and B separately",
    paper="Zhang et al., ICASSP 2024, arXiv 2305.05644",
    exact_when="all clients end with the same A, or all with the same B",
    mixed_ranks=False,
    downlink="A and B",
    secure_sum="factors",
    initial=shared_initial,
    broadcast=broadcast_factors,
    for_rank=whole,
    client_init=prefix_start,
    encode=factor_change,
    finalize=add_factors,
)

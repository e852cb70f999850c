"""Averages A and B after padding them with zeros to the largest rank (zero-padding).

    A = sum_k p_k pad(A_k)        B = sum_k p_k s_k pad(B_k)        pad: (r_k, n) -> (r_max, n)

Directions that only some clients have are diluted by the zeros of the others; client k goes on from
the first r_k directions. The baseline for mixed ranks in FLoRA, arXiv 2409.05976, section 3.

Exact when all ranks are equal and all clients end with the same A, or all with the same B.
"""

from __future__ import annotations

from fedlora.methods.rule import Rule
from fedlora.methods.shared import (
    add_factors,
    broadcast_factors,
    cut_to_rank,
    padded_change,
    prefix_start,
    shared_initial,
    shift_to_zeros,
)

RULE = Rule(
    name="zero_pad",
    title="pad A and B with zeros to the largest rank and average them",
    paper="the baseline of Wang et al., NeurIPS 2024, arXiv 2409.05976",
    exact_when="all ranks are equal and all clients end with the same A, or all with the same B",
    mixed_ranks=True,
    downlink="the first r_k directions of A and B",
    secure_sum="factors",
    initial=shared_initial,
    broadcast=broadcast_factors,
    for_rank=cut_to_rank,
    client_init=prefix_start,
    encode=padded_change,
    shift=shift_to_zeros,
    finalize=add_factors,
)

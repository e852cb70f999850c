"""Trains and averages B in odd rounds and A in even ones (RoLoRA).

    odd rounds   A frozen:  B = sum_k p_k s_k B_k
    even rounds  B frozen:  A = sum_k p_k A_k

In every round one factor is common to all clients, so the mean of the other is the mean of the
products. Only the trained factor travels up.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
arXiv 2502.01755.

Exact when: always (all clients have one rank).
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
from fedlora.methods.values import Training

_TRAINING = Training(trains=("B", "A"))


def _sent_down(round: int, seen: bool) -> str:
    """Who took part in the round before lacks the factor that was trained in it."""
    return _TRAINING.trained(round - 1) if seen else "AB"


RULE = Rule(
    name="rolora",
    title="train and average B in odd rounds, A in even ones",
    paper="Chen et al., arXiv 2502.01755",
    exact_when="always",
    mixed_ranks=False,
    downlink="the factor trained in the round before",
    secure_sum="factors",
    initial=shared_initial,
    broadcast=broadcast_factors,
    for_rank=whole,
    client_init=prefix_start,
    encode=factor_change,
    finalize=add_factors,
    training=lambda options: _TRAINING,
    sent_down=_sent_down,
    server_momentum=False,
    one_shot=False,
)

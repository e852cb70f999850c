"""Averages A, while every client keeps a B of its own (FedSA-LoRA).

    A = sum_k p_k A_k        B_k stays with client k and is trained on in its next round

There is no global model: client k's model is `W_0 + s_k B_k A`. Only A travels. The server's state
holds A and `B = 0`, or the B of an adapter to go on from, which every client is sent once.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
arXiv 2410.01463.

Exact when: never asked: the rule makes a model for every client, and no global one.
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

RULE = Rule(
    name="fedsa",
    title="average A; every client keeps its own B, and so its own model",
    paper="Guo et al., ICLR 2025, arXiv 2410.01463",
    exact_when="never asked: it makes one model for every client and no global one",
    mixed_ranks=False,
    downlink="A (and the B of an adapter to go on from: once)",
    secure_sum="factors",
    initial=shared_initial,
    broadcast=broadcast_factors,
    for_rank=whole,
    client_init=prefix_start,
    encode=factor_change,
    finalize=add_factors,
    training=lambda options: Training(keeps="B"),
    sent_down=lambda round, seen: "A",
    one_shot=False,
)

"""Averages padded factors, weighted by the norm of B A, and prunes ranks (HetLoRA).

    w_k = p_k ||s_k B_k A_k||_F        A = sum_k w_k pad(A_k) / sum_k w_k        B alike

module by module; client k goes on from the first r_k directions. While training it adds

    lambda sum_modules ||s B[:, t:]||_F ||A[t:]||_F,        t = gamma r_k

to its loss; where that sum has shrunk at the end, it goes on with rank `gamma r_k`. The paper's
weights are the norms alone: `client_weights: uniform`.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
EMNLP 2024, arXiv 2401.06432.

Exact when one client of the largest rank takes part, or all have that rank and end with the same A
and B.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedlora.lowrank import Adapter, LowRank, norm
from fedlora.methods.rule import Rule, bounded, check_bounds
from fedlora.methods.shared import (
    broadcast_factors,
    cut_to_rank,
    padded_change,
    prefix_start,
    present,
    shared_initial,
    shift_to_zeros,
)
from fedlora.methods.values import Aggregate, Encoded, RoundNumbers, ServerState, Start, Training


@dataclass(frozen=True)
class Options:
    """Keys of the rule.

    Args:
        rank_penalty: lambda, the weight of the tail in the clients' loss.
        rank_decay: gamma, the share of a rank that is no tail; 1 switches pruning off.
    """

    rank_penalty: float = bounded(1e-3, training=True, ge=0)
    rank_decay: float = bounded(0.99, training=True, gt=0, le=1)

    def __post_init__(self) -> None:
        check_bounds(self)


def _training(options: Options) -> Training:
    return Training(
        tail_penalty=options.rank_penalty,
        tail_from=options.rank_decay,
        prunes=options.rank_decay < 1.0,
    )


def _encode(update: Adapter, start: Start, numbers: RoundNumbers, options: Options) -> Encoded:
    """`padded_change` and its weights, all times the norm of the client's product."""
    padded = padded_change(update, start, numbers, options)
    factors: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, x in update.items():
        size = norm(x)
        factors |= {key: size * padded.factors[key] for key in (f"{name}.A", f"{name}.B")}
        weights |= {key: size * padded.weights[key] for key in (name, present(name))}
    return Encoded(factors, weights=weights)


def _finalize(total: Encoded, state: ServerState, rank: int, options: Options) -> Aggregate:
    adapter = {}
    for name, current in state.adapter.items():
        assert isinstance(current, LowRank)
        adapter[name] = current
        weight = total.weights.get(name)
        if weight is not None and weight > 0:  # else nobody trained it, or all have learnt nothing
            adapter[name] = LowRank(
                current.A + total.factors[f"{name}.A"] / weight,
                current.B + total.factors[f"{name}.B"] / weight,
            )
    return Aggregate(adapter)


RULE = Rule(
    name="hetlora",
    title="pad A and B with zeros, weigh clients by the norm of B A; ranks prune themselves",
    paper="Cho et al., EMNLP 2024, arXiv 2401.06432",
    exact_when="one client takes part, or all end with the same A and B, of the largest rank",
    mixed_ranks=True,
    downlink="the first r_k directions of A and B",
    secure_sum="factors",
    initial=shared_initial,
    broadcast=broadcast_factors,
    for_rank=cut_to_rank,
    client_init=prefix_start,
    encode=_encode,
    shift=shift_to_zeros,
    finalize=_finalize,
    training=_training,
    server_optimiser=False,
    options=Options,
)

"""Sums products partition by partition of the rank, each over those who train it (raFLoRA).

The distinct ranks of the federation, r_1 < r_2 < ..., cut the directions into partitions
`h = [r_(h-1), r_h)`. Only clients of rank r_h or more train partition h:

    S' = sum_h  sum_(k: r_k >= r_h) p_k s_k B_k[:, h] A_k[h]  /  sum_(k: r_k >= r_h) p_k

and every client goes on from the leading directions of S' that its rank affords, as in FlexLoRA.
Without the division the directions that few clients train fade from round to round (rank collapse).
A partition that nobody of a round has trained stays as it is in S.

Wu et al., "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity",
arXiv 2602.13486.

Exact when all ranks are equal and none is below that of the global update, and every client trains
every module.
"""

from __future__ import annotations

from typing import Any

import torch

from fedlora.lowrank import Adapter, Delta, LowRank, add, compact, leading, scale
from fedlora.methods.flexlora import global_sum, leading_directions, top_start
from fedlora.methods.rule import Rule
from fedlora.methods.shared import cut_to_rank
from fedlora.methods.values import Aggregate, Encoded, ServerState, Start
from fedlora.threads import each


def partitions(state: ServerState) -> list[tuple[int, int]]:
    """`[(0, r_1), (r_1, r_2), ...]`, by the ranks of all clients of the federation."""
    levels = sorted(set(state.ranks.values()))
    return list(zip([0, *levels[:-1]], levels, strict=True))


def _key(name: str, partition: int) -> str:
    return f"{name}#{partition}"


def _encode(update: Adapter, start: Start, state: ServerState, options: Any) -> Encoded:
    factors, products = {}, dict[str, Delta]()
    for name, x in update.items():
        for h, (begin, end) in enumerate(partitions(state)):
            if x.rank >= end:
                products[_key(name, h)] = LowRank(x.A[begin:end], x.B[:, begin:end])
                factors[_key(name, h)] = torch.ones((), dtype=x.A.dtype)
    return Encoded(factors, products)


def _finish(total: Encoded, state: ServerState, rank: int, options: Any) -> Aggregate:
    trained = {key.rpartition("#")[0] for key in total.products}
    highest, sums = max(state.ranks.values()), dict[str, Delta]()
    for name in sorted(trained):
        terms: list[Delta] = []
        for h, (begin, end) in enumerate(partitions(state)):
            key = _key(name, h)
            if key in total.products:
                terms.append(scale(total.products[key], 1.0 / float(total.factors[key])))
            elif name in state.adapter:
                before = state.adapter[name]
                before = before if isinstance(before, LowRank) else leading(before, highest)
                terms.append(LowRank(before.A[begin:end], before.B[:, begin:end]))
        sums[name] = add(terms)
    return Aggregate({**state.adapter, **each(compact, sums)})


RULE = Rule(
    name="raflora",
    title="sum the products, each rank partition weighted over the clients that train it",
    paper="Wu et al., arXiv 2602.13486",
    exact_when="all ranks are equal and none is below that of the global update, and every client "
    "trains every module",
    mixed_ranks=True,
    downlink="the leading r_k directions",
    secure_sum="factors and products",
    initial=global_sum,
    prepare=leading_directions,
    cut=cut_to_rank,
    start=top_start,
    encode=_encode,
    finish=_finish,
    server_optimiser=False,
)

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

from collections.abc import Sequence
from typing import Any

from fedlora.lowrank import Adapter, Delta, LowRank, add, drop_null_directions, scale, top
from fedlora.methods.flexlora import global_sum, leading_directions, top_start
from fedlora.methods.rule import Rule
from fedlora.methods.shared import cut_to_rank
from fedlora.methods.values import Aggregate, Encoded, RoundNumbers, ServerState, Start
from fedlora.threads import map_modules


def partitions(levels: Sequence[int]) -> list[tuple[int, int]]:
    """`[(0, r_1), (r_1, r_2), ...]`, from the distinct ranks of the federation, ascending."""
    return list(zip([0, *levels[:-1]], levels, strict=True))


def _key(name: str, partition: int) -> str:
    return f"{name}#{partition}"


def _encode(update: Adapter, start: Start, numbers: RoundNumbers, options: Any) -> Encoded:
    """Every partition that the client trains as a product, and a one to sum its weight by."""
    weights, products = {}, dict[str, Delta]()
    for name, x in update.items():
        for h, (begin, end) in enumerate(partitions(numbers.levels)):
            if x.rank >= end:
                products[_key(name, h)] = LowRank(x.A[begin:end], x.B[:, begin:end])
                weights[_key(name, h)] = x.A.new_ones(())
    return Encoded(products=products, weights=weights)


def _finalize(total: Encoded, state: ServerState, rank: int, options: Any) -> Aggregate:
    trained = {key.rpartition("#")[0] for key in total.products}
    sums = dict[str, Delta]()
    for name in sorted(trained):
        terms: list[Delta] = []
        for h, (begin, end) in enumerate(partitions(state.levels)):
            key = _key(name, h)
            if key in total.products:
                terms.append(scale(total.products[key], 1.0 / float(total.weights[key])))
            elif name in state.adapter:
                before = top(state.adapter[name], state.levels[-1])
                terms.append(LowRank(before.A[begin:end], before.B[:, begin:end]))
        sums[name] = add(terms)
    return Aggregate({**state.adapter, **map_modules(drop_null_directions, sums)})


RULE = Rule(
    name="raflora",
    title="sum the products, each rank partition weighted over the clients that train it",
    paper="Wu et al., arXiv 2602.13486",
    exact_when="all ranks are equal and none is below that of the global update, and every client "
    "trains every module",
    mixed_ranks=True,
    downlink="the leading r_k directions",
    secure_sum="products",
    feedback="none",
    initial=global_sum,
    broadcast=leading_directions,
    for_rank=cut_to_rank,
    client_init=top_start,
    encode=_encode,
    finalize=_finalize,
    server_optimiser=False,
)

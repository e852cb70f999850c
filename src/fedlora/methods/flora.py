"""Stacks all adapters and merges the stack into the base; clients start afresh (FLoRA).

    B = [p_1 s_1 B_1 | ... | p_K s_K B_K]      A = [A_1; ...; A_K]      B A = sum_k p_k s_k B_k A_k

The stack is merged into the frozen side; every client starts the next round from a fresh adapter.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, arXiv 2409.05976.

Exact when: always, for every mix of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedlora.lowrank import Adapter, Deltas
from fedlora.methods.rule import Fresh, Rule, Shapes, bounded, check_bounds
from fedlora.methods.shared import fresh_start, product_change, whole
from fedlora.methods.values import Aggregate, Encoded, Prepared, ServerState, Start


@dataclass(frozen=True)
class Options:
    """Keys of the rule.

    Args:
        scaling_factor: a constant in the place of every client's weight p_k (the ablation of the
            paper's section 4.3); none: the shares of the rows.
    """

    scaling_factor: float | None = bounded(None, gt=0)

    def __post_init__(self) -> None:
        check_bounds(self)


def _initial(shapes: Shapes, rank: int, fresh: Fresh, given: Adapter) -> tuple[Deltas, Deltas]:
    return {}, dict(given)


def _broadcast(state: ServerState, rank: int, options: Any) -> Prepared:
    return Prepared({}, {})


def _client_init(
    adapter: Deltas, leading: Adapter, shapes: Shapes, rank: int, fresh: Fresh, options: Any
) -> Start:
    return Start(fresh_start(shapes, rank, fresh))


def _finalize(total: Encoded, state: ServerState, rank: int, options: Any) -> Aggregate:
    return Aggregate(adapter={}, merge=total.products)


RULE = Rule(
    name="flora",
    title="stack all adapters, merge the stack, start afresh",
    paper="Wang et al., NeurIPS 2024, arXiv 2409.05976",
    exact_when="always",
    mixed_ranks=True,
    downlink="the stack of the round before",
    secure_sum="products",
    sums_learnt=True,
    feedback="product",
    initial=_initial,
    broadcast=_broadcast,
    for_rank=whole,
    client_init=_client_init,
    encode=product_change,
    finalize=_finalize,
    fixed_weight=lambda options: options.scaling_factor,
    options=Options,
)

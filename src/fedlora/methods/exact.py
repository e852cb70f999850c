"""Adds what every client learnt to a global update that is kept whole (the default).

The global update S is kept whole. Everyone is sent S (or `S_hat`, its best approximation of rank
`max_rank`) and client k splits it at its own rank into what it trains and what lies frozen beside:

    start_k + rest_k = S        S' = S + sum_k p_k (s_k B_k A_k - start_k)

Exactness does not depend on the split. `start_fraction` 1 trains the leading r_k singular
directions of S, 0 starts afresh as FLoRA does, between them some of each: always the leading ones
can exhaust a small rank, always afresh loses what the directions have learnt in many short rounds.
The leading directions are handed out balanced, `||A_i|| = ||B_i||`: with orthonormal A and all
weight in B, Adam's steps on A are too large. Directions that S does not fill are fresh (A random,
B = 0).

Rests on the algebra of FLoRA (arXiv 2409.05976) and the refactoring of FlexLoRA (arXiv 2402.11505).

Exact when: always, for every mix of ranks, participation, `start_fraction` and `max_rank`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.lowrank import (
    Adapter,
    Delta,
    Deltas,
    LowRank,
    add,
    balance,
    cheaper_form,
    concat,
    drop_null_directions,
    merge_equal_rows,
    norm,
    prefix,
    subtract,
    top,
    total_norm,
    zeros,
)
from fedlora.methods.rule import Fresh, Rule, Shapes, bounded, check_bounds
from fedlora.methods.shared import fill, product_change
from fedlora.methods.values import Aggregate, Encoded, Prepared, ServerState, Start
from fedlora.threads import map_modules


@dataclass(frozen=True)
class Options:
    """Keys of the rule.

    Args:
        start_fraction: share of a client's rank that starts from the leading directions of the
            global update, in [0, 1]; the remaining directions start afresh.
        max_rank: send at most this rank of the global update (none: all of it).
    """

    start_fraction: float = bounded(0.75, training=True, ge=0, le=1)
    max_rank: int | None = bounded(None, training=True, ge=1)

    def __post_init__(self) -> None:
        check_bounds(self)


def _initial(shapes: Shapes, rank: int, fresh: Fresh, given: Adapter) -> tuple[Deltas, Deltas]:
    return {name: drop_null_directions(x) for name, x in given.items()}, {}


def _broadcast(state: ServerState, rank: int, options: Options) -> Prepared:
    def divided(whole: Delta) -> tuple[Delta, LowRank, float]:
        """What is sent of one module, its leading directions, and the square of what is lost."""
        sent, lost = whole, 0.0
        if options.max_rank is not None and options.max_rank < whole.rank:
            sent = top(whole, options.max_rank)
            lost = norm(subtract(whole, sent)) ** 2
        held = cheaper_form(sent)
        if isinstance(held, LowRank):
            return held, held, lost
        return held, top(sent, from_global(rank, options)), lost

    modules = map_modules(divided, state.adapter)
    lost = sum(lost_of_module for _, _, lost_of_module in modules.values())
    total = total_norm(state.adapter) if lost else 0.0
    return Prepared(
        adapter={name: sent for name, (sent, _, _) in modules.items()},
        leading={name: leading for name, (_, leading, _) in modules.items()},
        error=lost**0.5 / total if total else 0.0,
    )


def from_global(rank: int, options: Options) -> int:
    """How many of a client's directions start from the global update; halves count up."""
    return int(options.start_fraction * rank + 0.5)


def _for_rank(prepared: Prepared, rank: int, options: Options) -> Prepared:
    """All of S; beside a dense one the directions this client starts from."""
    used = from_global(rank, options)
    leading = {
        name: x if isinstance(prepared.adapter[name], LowRank) else prefix(x, used)
        for name, x in prepared.leading.items()
    }
    return Prepared(prepared.adapter, leading, prepared.error)


def _client_init(
    adapter: Deltas, leading: Adapter, shapes: Shapes, rank: int, fresh: Fresh, options: Options
) -> Start:
    used = from_global(rank, options)
    trained: dict[str, LowRank] = {}
    private: dict[str, LowRank] = {}
    for name, shape in shapes.items():
        if name not in adapter:
            trained[name] = fill(zeros(shape), fresh(name, rank))
            continue
        continued = balance(prefix(leading[name], used))
        trained[name] = fill(continued, fresh(name, rank - continued.rank))
        private[name] = LowRank(continued.A, -continued.B)  # S less what is trained of it
    return Start(trained, private, adapter)


def _finalize(total: Encoded, state: ServerState, rank: int, options: Options) -> Aggregate:
    """S' = S + sum. The starts are S's own directions, so subtracting them adds none to S."""
    sums: dict[str, Delta] = {}
    for name, learnt in total.products.items():
        whole = state.adapter.get(name)
        if isinstance(whole, LowRank) and isinstance(learnt, LowRank):
            sums[name] = merge_equal_rows(concat([balance(whole), learnt]))
        else:
            sums[name] = learnt if whole is None else add([whole, learnt])
    return Aggregate({**state.adapter, **map_modules(drop_null_directions, sums)})


RULE = Rule(
    name="exact",
    title="add what each client learnt to the global update, kept whole; no reset",
    paper="this project; on arXiv 2409.05976 and 2402.11505",
    exact_when="always",
    mixed_ranks=True,
    downlink="the whole global update",
    secure_sum="products",
    sums_learnt=True,
    initial=_initial,
    broadcast=_broadcast,
    for_rank=_for_rank,
    client_init=_client_init,
    encode=product_change,
    finalize=_finalize,
    options=Options,
)

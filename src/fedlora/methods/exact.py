"""Adds what every client learnt to a global update that is kept whole (the default).

The global update S is kept whole. Everyone has S (or is sent `S_hat`, its best approximation of
rank `max_rank`) and client k splits it at its own rank into what it trains and what lies frozen
beside:

    start_k + rest_k = S        S' = S + sum_k p_k (s_k B_k A_k - start_k)

Exactness does not depend on the split, so the split is chosen by how well clients learn from it.
`start_fraction` 1 trains the leading r_k singular directions of S, 0 starts afresh as FLoRA does,
between them some of each: always the leading ones can exhaust a small rank, always afresh loses
what the directions have learnt in many short rounds. Directions that S does not fill are fresh (A
random, B = 0).

A leading direction i of S, `sigma_i u_i v_i^T`, starts at client k from

    A_i = 3^-0.5 v_i^T (1, n)      B_i = 3^0.5 min(sigma_i, start_cap / r_k) u_i (m, 1)

and what is above the cap lies frozen. Rows of A are as long as fresh ones, because Adam moves every
number by about its learning rate: beside shorter rows a step in B moves the product less. A column
of B is bounded, because beside a longer one a step in A moves the product too much.

S is kept by appending and its leading directions are followed (`methods.tracking`), so that a round
costs the same however many there were before, at the server and on the wire.

Rests on the algebra of FLoRA (arXiv 2409.05976) and the refactoring of FlexLoRA (arXiv 2402.11505).

Exact when: always, for every mix of ranks, participation, `start_fraction` and `max_rank`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from fedlora.lowrank import (
    Adapter,
    Delta,
    Deltas,
    LowRank,
    add,
    cheaper_form,
    drop_null_directions,
    norm,
    prefix,
    subtract,
    total_norm,
    zeros,
)
from fedlora.methods.rule import Fresh, Rule, Shapes, bounded, check_bounds
from fedlora.methods.shared import fill, product_change
from fedlora.methods.tracking import (
    FRESH_ROW,
    advanced,
    as_starts,
    basis_size,
    choose_turn,
    divided,
    leading_directions,
    none_like,
    turned,
    unchanged,
)
from fedlora.methods.values import Aggregate, Encoded, Increment, Prepared, ServerState, Start
from fedlora.threads import map_modules


@dataclass(frozen=True)
class Options:
    """Keys of the rule.

    Args:
        start_fraction: share of a client's rank that starts from the leading directions of the
            global update, in [0, 1]; the remaining directions start afresh.
        start_cap: the most of a leading direction's singular value that a client trains, times the
            client's rank; the rest of it lies frozen (none: all of it is trained).
        max_rank: send at most this rank of the global update (none: all of it).
    """

    start_fraction: float = bounded(0.75, training=True, ge=0, le=1)
    start_cap: float | None = bounded(0.67, training=True, gt=0)
    max_rank: int | None = bounded(None, training=True, ge=1)

    def __post_init__(self) -> None:
        check_bounds(self)


def _initial(shapes: Shapes, rank: int, fresh: Fresh, given: Adapter) -> tuple[Deltas, Deltas]:
    return {name: drop_null_directions(x) for name, x in given.items()}, {}


def _broadcast(state: ServerState, rank: int, options: Options) -> Prepared:
    def cut(name: str) -> tuple[Delta, LowRank, float]:
        """What is sent of one module, its leading directions, and the square of what is lost."""
        whole, leading = state.adapter[name], _leading(state, name, rank, options)
        if options.max_rank is None or options.max_rank >= whole.rank:
            return whole, leading, 0.0
        best = prefix(leading, options.max_rank)
        lost = norm(subtract(whole, best)) ** 2
        held = cheaper_form(best)
        return held, held if isinstance(held, LowRank) else best, lost

    modules = map_modules(cut, {name: name for name in state.adapter})
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


def _size(shape: tuple[int, int], rank: int, options: Options) -> int:
    """How many leading directions of a module are followed; `rank` is the largest client's."""
    return basis_size(max(from_global(rank, options), options.max_rank or 0), shape)


def _leading(state: ServerState, name: str, rank: int, options: Options) -> LowRank:
    """The leading directions of a module's S; found anew where they were not followed so far."""
    if name in state.leading:
        return state.leading[name]
    whole = state.adapter[name]
    return leading_directions(whole, _size(whole.shape, rank, options))


def _for_rank(prepared: Prepared, rank: int, options: Options) -> Prepared:
    """All of S, and the directions that this client starts from."""
    used = from_global(rank, options)
    leading = {
        name: x if x is prepared.adapter[name] else prefix(x, used)
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
        continued = _capped(as_starts(prefix(leading[name], used)), rank, options)
        trained[name] = fill(continued, fresh(name, rank - continued.rank))
        private[name] = LowRank(continued.A, -continued.B)  # S less what is trained of it
    return Start(trained, private, adapter)


def _capped(starts: LowRank, rank: int, options: Options) -> LowRank:
    """These directions with columns of B shortened to what a client of this rank trains."""
    if options.start_cap is None:
        return starts
    limit = options.start_cap / rank / FRESH_ROW
    # Lengths are taken along contiguous rows: so the last digits of one do not depend on how many
    # other directions there are.
    lengths = starts.B.T.contiguous().norm(dim=1)  # (j,)
    return LowRank(starts.A, starts.B * (limit / lengths.clamp_min(limit)))


class _Module(NamedTuple):
    """One module after a round; no increment where all of it is smaller than its change."""

    whole: Delta
    leading: LowRank
    increment: Increment | None


def _finalize(total: Encoded, state: ServerState, rank: int, options: Options) -> Aggregate:
    """S' = S + sum, and the leading directions of S'."""

    def advance(name: str) -> _Module:
        learnt = total.products.get(name)
        whole = state.adapter.get(name)
        if whole is None:
            assert learnt is not None
            leading = whole = none_like(learnt)
        else:
            leading = _leading(state, name, rank, options)
        if learnt is None or learnt.rank == 0:
            return _Module(whole, leading, unchanged(leading))
        size = _size(whole.shape, rank, options)
        if not isinstance(learnt, LowRank):
            whole = add([whole, learnt])
            return _Module(whole, leading_directions(whole, size), None)
        increment = Increment(*divided(learnt, leading), turn=None)
        whole = advanced(whole, leading, increment)
        turn = choose_turn(whole, leading, increment, size)
        increment = replace(increment, turn=turn)
        return _Module(whole, turned(whole, leading, increment), increment)

    names = dict.fromkeys([*state.adapter, *total.products])
    modules = map_modules(advance, {name: name for name in names})
    return Aggregate(
        adapter={name: x.whole for name, x in modules.items()},
        leading={name: x.leading for name, x in modules.items()},
        increments={name: x.increment for name, x in modules.items() if x.increment is not None},
    )


RULE = Rule(
    name="exact",
    title="add what each client learnt to the global update, kept whole; no reset",
    paper="this project; on arXiv 2409.05976 and 2402.11505",
    exact_when="always",
    mixed_ranks=True,
    downlink="what changed in the round before",
    secure_sum="products",
    sums_learnt=True,
    feedback="product",
    initial=_initial,
    broadcast=_broadcast,
    for_rank=_for_rank,
    client_init=_client_init,
    encode=product_change,
    finalize=_finalize,
    followed=lambda options: options.max_rank is None,
    plain_sum=True,
    options=Options,
)

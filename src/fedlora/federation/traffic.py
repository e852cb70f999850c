"""Counts what has to be transferred to a client at the beginning of a round, in bytes.

A client can make for itself what the seed gives (LoRA's initial A, a B of zeros) and keeps what it
was sent. All else counts in the round in which it is sent.
"""

from __future__ import annotations

from fedlora.lowrank import Deltas, LowRank, factor_bytes, nbytes
from fedlora.methods.rule import Fresh, Rule, Shapes
from fedlora.methods.values import Prepared, ServerState
from fedlora.seeds import SERVER, Purpose, fresh_factors


def initial_factors(seed: int, shapes: Shapes) -> Fresh:
    """The A that all clients of a run can draw for themselves before the first round."""
    return fresh_factors(seed, 0, SERVER, Purpose.SHARED_INIT, shapes)


def bytes_down(
    state: ServerState, sent: Prepared, rule: Rule, fresh: Fresh, *, seen: bool, new: bool
) -> int:
    """The bytes that a client lacks.

    Args:
        state: the server's, before the round.
        sent: what a client of this rank is sent.
        rule: which factors travel in a round (`sent_down`).
        fresh: the shared initial A that the seed gives, `(module, rank) -> A`.
        seen: it took part in the round before: of what was merged it lacks only the last round's.
        new: it has never been sent anything: of a factor that the rule never sends it lacks what
            the seed does not give, as where the run goes on from an adapter.
    """
    beside = {n: x for n, x in sent.leading.items() if x is not sent.adapter[n]}
    missing = nbytes(state.base_delta)
    if seen:
        missing = min(missing, nbytes(state.last_merge))
    dense = sum(t.nbytes for t in state.dense.values())
    lacking = rule.sent_down(state.round + 1, seen)
    once = beyond_seed(sent.adapter, {"A", "B"} - set(lacking), fresh) if new else 0
    return factor_bytes(sent.adapter, lacking) + once + nbytes(beside) + missing + dense


def beyond_seed(adapter: Deltas, factors: set[str], fresh: Fresh) -> int:
    """Bytes of the rows of A and the columns of B that are not those of a fresh adapter."""
    total = 0
    for name, x in adapter.items():
        if not isinstance(x, LowRank):
            continue
        if "A" in factors:
            differs = (fresh(name, x.rank).to(x.A) != x.A).any(dim=1)  # (r,)
            total += int(differs.sum()) * x.A.shape[1] * x.A.element_size()
        if "B" in factors:
            total += int(x.B.any(dim=0).sum()) * x.B.shape[0] * x.B.element_size()
    return total

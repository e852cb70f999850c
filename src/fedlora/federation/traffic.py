"""Tells what has to be transferred to a client at the beginning of a round, and counts its bytes.

A client can make for itself what the seed gives (LoRA's initial A, a B of zeros) and keeps what it
was sent. All else counts in the round in which it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fedlora.lowrank import Deltas, LowRank, nbytes
from fedlora.methods.rule import Fresh, Rule
from fedlora.methods.values import Prepared, ServerState


def tensors_down(
    state: ServerState, sent: Prepared, rule: Rule, fresh: Fresh, *, seen: bool, new: bool
) -> dict[str, Tensor]:
    """The tensors that a client lacks, by where they belong.

    Args:
        state: the server's, before the round.
        sent: what a client of this rank is sent.
        rule: which factors travel in a round (`sent_down`).
        fresh: the shared initial A that the seed gives, `(module, rank) -> A`.
        seen: it took part in the round before: of what was merged it lacks only the last round's.
        new: it has never been sent anything: of a factor that the rule never sends it lacks what
            the seed does not give, as where the run goes on from an adapter.
    """
    factors = rule.sent_down(state.round + 1, seen)
    beside = {name: x for name, x in sent.leading.items() if x is not sent.adapter[name]}
    merged = state.base_delta
    if seen and nbytes(state.last_merge) < nbytes(merged):
        merged = state.last_merge
    lacking = dict(_named("adapter", sent.adapter, factors))
    lacking |= _named("leading", beside, "AB")
    lacking |= _named("merged", merged, "AB")
    lacking |= {f"dense/{name}": value for name, value in state.dense.items()}
    if new:
        lacking |= _beyond_seed(sent.adapter, {"A", "B"} - set(factors), fresh)
    return lacking


def bytes_down(
    state: ServerState, sent: Prepared, rule: Rule, fresh: Fresh, *, seen: bool, new: bool
) -> int:
    """The bytes of `tensors_down`."""
    lacking = tensors_down(state, sent, rule, fresh, seen=seen, new=new)
    return sum(value.nbytes for value in lacking.values())


def _named(group: str, deltas: Deltas, factors: str) -> Iterator[tuple[str, Tensor]]:
    """The named factors of all updates; a dense update goes whole."""
    for name, x in deltas.items():
        if isinstance(x, LowRank):
            for factor, value in (("A", x.A), ("B", x.B)):
                if factor in factors:
                    yield f"{group}/{name}/{factor}", value
        else:
            yield f"{group}/{name}/W", x.W


def _beyond_seed(adapter: Deltas, factors: set[str], fresh: Fresh) -> Iterator[tuple[str, Tensor]]:
    """The rows of A and the columns of B that are not those of a fresh adapter."""
    for name, x in adapter.items():
        if not isinstance(x, LowRank):
            continue
        if "A" in factors:
            differs = (fresh(name, x.rank).to(x.A) != x.A).any(dim=1)  # (r,)
            yield f"adapter/{name}/A", x.A[differs]
        if "B" in factors:
            yield f"adapter/{name}/B", x.B[:, x.B.any(dim=0)]

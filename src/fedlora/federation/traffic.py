"""Tells what has to be transferred to a client at the beginning of a round.

A client can make for itself what the seed gives (LoRA's initial A, a B of zeros) and keeps what it
was sent. All else counts in the round in which it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fedlora.federation.compression import Compression, packed_bytes
from fedlora.federation.increments import changes_since
from fedlora.federation.messages import Lacking
from fedlora.lowrank import Delta, Deltas, LowRank
from fedlora.methods.rule import Fresh, Rule
from fedlora.methods.values import Prepared, ServerState


def lacking(
    state: ServerState,
    prepared: Prepared,
    sent: Prepared,
    rule: Rule,
    options: object,
    fresh: Fresh,
    held: int | None,
    compression: Compression = "none",
) -> Lacking:
    """What a client lacks of a broadcast.

    Args:
        state: the server's, before the round.
        prepared: what the round broadcasts.
        sent: what of it a client of this rank is sent.
        rule: whether clients keep the adapter (`followed`), or else which of its factors travel
            (`sent_down`).
        options: of the rule.
        fresh: the shared initial A that the seed gives, `(module, rank) -> A`.
        held: the round whose global model the client holds, as committed; None where it has never
            been sent anything, or has lost it. Of a factor that the rule never sends it then lacks
            what the seed does not give, as where the run goes on from an adapter.
        compression: what is sent was rounded to.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, list[int]] = {}
    if rule.followed(options):
        for name, x in prepared.adapter.items():
            tensors |= _followed(state, name, x, prepared.leading[name], held, compression)
    else:
        factors = rule.sent_down(state.round + 1, held is not None and held == state.round - 1)
        tensors |= _named("adapter", sent.adapter, factors)
        if held is None:
            for place, (value, indices) in _beyond_seed(sent.adapter, factors, fresh).items():
                tensors[place], places[place] = value, indices
        beside = {name: x for name, x in sent.leading.items() if x is not sent.adapter[name]}
        tensors |= _named("leading", beside)
    tensors |= _beside_the_adapter(state, held, compression)
    return Lacking(held, tensors, places, compression)


def model_lacking(
    state: ServerState,
    prepared: Prepared,
    followed: bool,
    held: int | None,
    compression: Compression = "none",
) -> Lacking:
    """What a site lacks of the global model itself, to evaluate it.

    Args:
        state: the server's, between two rounds.
        prepared: what the next round would broadcast.
        followed: whether clients keep the adapter.
        held: the round whose global model the site holds; None: none.
        compression: what is sent was rounded to.
    """
    tensors = _named("adapter", {} if followed else state.adapter)
    if followed:
        for name, x in prepared.adapter.items():
            tensors |= _followed(state, name, x, prepared.leading[name], held, compression)
    tensors |= _beside_the_adapter(state, held, compression)
    return Lacking(held, tensors, compression=compression)


def _beside_the_adapter(
    state: ServerState, held: int | None, compression: Compression
) -> dict[str, Tensor]:
    """What was merged, as far as it is lacking, and the parameters that are trained whole."""
    tensors: dict[str, Tensor] = {}
    for name, x in state.base_delta.items():
        tensors |= _merged(state, name, x, held, compression)
    return tensors | {f"dense/{name}": value for name, value in state.dense.items()}


def _followed(
    state: ServerState,
    name: str,
    whole: Delta,
    leading: LowRank,
    held: int | None,
    compression: Compression,
) -> dict[str, Tensor]:
    """One module of an adapter that clients keep: what has changed of it, or all of it."""
    everything = {**_named("whole", {name: whole}), f"whole/{name}/basis": leading.A}
    changes = changes_since(state, held)
    if changes is None or any(name not in change.increments for _, change in changes):
        return everything
    changed = {
        f"increment/{number}/{name}/{part}": value
        for number, change in changes
        for part, value in change.increments[name].tensors.items()
    }
    return _smaller(changed, everything, compression)


def _merged(
    state: ServerState, name: str, whole: Delta, held: int | None, compression: Compression
) -> dict[str, Tensor]:
    """One module of what was merged: what the rounds have added since, or all of it."""
    everything = _named("merged", {name: whole})
    changes = changes_since(state, held)
    if changes is None:
        return everything
    changed: dict[str, Tensor] = {}
    for number, change in changes:
        if name in change.merge:
            changed |= _named(f"merge/{number}", {name: change.merge[name]})
    return _smaller(changed, everything, compression)


def _smaller(
    changed: dict[str, Tensor], everything: dict[str, Tensor], compression: Compression
) -> dict[str, Tensor]:
    fewer = packed_bytes(changed, compression) < packed_bytes(everything, compression)
    return changed if fewer else everything


def _named(group: str, deltas: Deltas, factors: str = "AB") -> dict[str, Tensor]:
    """The named factors of all updates; a dense update goes whole."""
    return dict(_items(group, deltas, factors))


def _items(group: str, deltas: Deltas, factors: str) -> Iterator[tuple[str, Tensor]]:
    for name, x in deltas.items():
        if isinstance(x, LowRank):
            for factor, value in (("A", x.A), ("B", x.B)):
                if factor in factors:
                    yield f"{group}/{name}/{factor}", value
        else:
            yield f"{group}/{name}/W", x.W


def _beyond_seed(adapter: Deltas, sent: str, fresh: Fresh) -> dict[str, tuple[Tensor, list[int]]]:
    """Rows of A and columns of B that are not those of a fresh adapter, and which they are.

    Args:
        adapter: the global one.
        sent: the factors that travel anyway.
        fresh: what the seed gives.
    """
    found: dict[str, tuple[Tensor, list[int]]] = {}
    for name, x in adapter.items():
        if not isinstance(x, LowRank):
            continue
        if "A" not in sent:
            differs = (fresh(name, x.rank).to(x.A) != x.A).any(dim=1)  # (r,)
            found[f"beyond/{name}/A"] = x.A[differs], differs.nonzero().flatten().tolist()
        if "B" not in sent:
            differs = x.B.any(dim=0)
            found[f"beyond/{name}/B"] = x.B[:, differs], differs.nonzero().flatten().tolist()
    return found

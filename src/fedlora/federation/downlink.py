"""Rounds what the server hands out to be kept, and keeps what rounding has lost for a later round.

What clients keep of the global model (what is merged into its frozen side, and what is appended to
an adapter that they follow) is rounded before the server itself takes it in. So everybody has the
same model to the bit, and what is lost is not in it: the server adds it to what it hands out next.
An adapter that is sent anew in every round needs nothing of the kind. It is rounded on its way
(`compression.rounded_prepared`), while the server's own stays whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from fedlora.federation.compression import difference, rounded_prepared, rounded_update
from fedlora.federation.exchange import Agreement
from fedlora.federation.increments import laid_out
from fedlora.federation.participants import Federation
from fedlora.lowrank import (
    Adapter,
    Delta,
    Deltas,
    Dense,
    LowRank,
    add,
    cheaper_form,
    concat,
    norm,
    prefix,
    refactor,
)
from fedlora.methods.tracking import as_starts, divided, with_images
from fedlora.methods.values import Aggregate, Encoded, Prepared, ServerState
from fedlora.threads import one_thread

_NEGLIGIBLE = 1e-5  # relative; a stack of rounded updates is rounded again without further loss


@dataclass(frozen=True)
class HandedOut:
    """What a round makes of the global model, as everybody has it.

    Args:
        aggregate: the rule's, of rounded changes; what is merged is laid out as it arrives.
        unsent: what is missing of them, to be added to later ones.
        error: `||missing||_F / ||meant||_F` over all modules.
    """

    aggregate: Aggregate
    unsent: Deltas = field(default_factory=dict)
    error: float = 0.0


def handed_out(applied: Encoded, before: ServerState, federation: Federation) -> HandedOut:
    """The outcome of the rule, with what clients keep of it rounded where messages are compressed.

    Args:
        applied: what the server's step applies.
        before: the state before the round.
        federation: who takes part, and by which agreement.
    """
    agreement, rank = federation.agreement, max(federation.ranks)
    finalize, options = agreement.rule.finalize, agreement.options
    if agreement.followed and agreement.compression != "none":
        changes = rounded_changes(applied.products, before.unsent, federation, before.leading)
        applied = replace(applied, products=changes.deltas)
        aggregate, whole = _rounded_matrices(finalize(applied, before, rank, options), federation)
        unsent = {**changes.unsent, **whole.unsent}
        return HandedOut(aggregate, unsent, max(changes.error, whole.error))
    aggregate = finalize(applied, before, rank, options)
    merge = {name: cheaper_form(x) for name, x in aggregate.merge.items()}
    changes = rounded_changes(merge, before.unsent, federation)
    aggregate = replace(aggregate, merge=laid_out(changes.deltas))
    return HandedOut(aggregate, changes.unsent, changes.error)


@dataclass(frozen=True)
class Rounded:
    """Updates as clients decode them.

    Args:
        deltas: by module.
        unsent: what is missing of them, to be added to later ones.
        error: `||missing||_F / ||meant||_F` over all modules.
    """

    deltas: dict[str, Delta]
    unsent: dict[str, Delta] = field(default_factory=dict)
    error: float = 0.0


@one_thread()
def rounded_changes(
    changes: Deltas, unsent: Deltas, federation: Federation, known: Adapter | None = None
) -> Rounded:
    """What a round changes, and what earlier ones owe, rounded.

    Args:
        changes: by module.
        unsent: what was missing of earlier ones.
        federation: to what its messages are rounded, and whether what is missing is kept: of an
            update in factors as many directions as the largest client has, of a matrix all.
        known: of an adapter that clients keep, the directions that everybody has. What a change
            says of them is a few numbers, which are not rounded. A change that is a matrix is not
            rounded either: the adapter becomes one, and is.
    """
    compression, rank = federation.agreement.compression, max(federation.ranks)
    if compression == "none":
        return Rounded(dict(changes))
    deltas, missing, lost, meant = dict[str, Delta](), dict[str, Delta](), 0.0, 0.0
    for name in dict.fromkeys([*changes, *unsent]):
        x = cheaper_form(add([group[name] for group in (changes, unsent) if name in group]))
        if known is not None and isinstance(x, Dense):
            deltas[name] = x
            continue
        beside, free = _apart(x, (known or {}).get(name))
        sent = rounded_update(free, compression)
        deltas[name] = sent if beside is None else _joined(beside, sent)
        rest, size = difference(free, sent), norm(x)
        missed = norm(rest)
        lost, meant = lost + missed**2, meant + size**2
        if federation.compression_feedback and missed > _NEGLIGIBLE * size:
            missing[name] = prefix(refactor(rest), rank) if isinstance(rest, LowRank) else rest
    return Rounded(deltas, missing, _share(lost, meant))


@one_thread()
def _rounded_matrices(aggregate: Aggregate, federation: Federation) -> tuple[Aggregate, Rounded]:
    """An adapter that clients keep, rounded where it has become a matrix that is sent whole.

    Returns:
        The aggregate with the rounded matrices, and these with what is missing of them.
    """
    adapter, leading = dict(aggregate.adapter), dict(aggregate.leading)
    matrices, missing, lost, meant = dict[str, Delta](), dict[str, Delta](), 0.0, 0.0
    for name, x in aggregate.adapter.items():
        if name in aggregate.increments or not isinstance(x, Dense):
            continue
        sent = rounded_update(x, federation.agreement.compression)
        rest = difference(x, sent)
        matrices[name] = adapter[name] = sent
        leading[name] = with_images(sent, leading[name].A)
        lost, meant = lost + norm(rest) ** 2, meant + norm(x) ** 2
        if federation.compression_feedback:
            missing[name] = rest
    rounded = Rounded(matrices, missing, _share(lost, meant))
    return replace(aggregate, adapter=adapter, leading=leading), rounded


def _share(lost: float, meant: float) -> float:
    """The ratio of two norms, from their squares."""
    return math.sqrt(lost / meant) if meant else 0.0


def _apart(x: Delta, known: LowRank | None) -> tuple[LowRank | None, Delta]:
    """What an update says of known directions, and the rest of it."""
    if known is None or not isinstance(x, LowRank):
        return None, x
    stack, weights = divided(x, known)
    directions = prefix(as_starts(known), len(weights))
    used = weights != 0
    return LowRank(directions.A[used], (directions.B * weights)[:, used]), stack


def _joined(beside: LowRank, sent: Delta) -> Delta:
    assert isinstance(sent, LowRank), "a stack is made of factors"
    return concat([sent, beside])


def as_it_arrives(sent: Prepared, agreement: Agreement, round: int) -> tuple[Prepared, float]:
    """An adapter that clients are sent, as they decode it; one that they keep stays as it is.

    Args:
        sent: what is meant to be sent to clients of one rank.
        agreement: of the federation.
        round: counted from 1.

    Returns:
        What they decode, and `||meant - sent||_F / ||meant||_F` over all modules.
    """
    if agreement.compression == "none" or agreement.followed:
        return sent, 0.0
    ever = agreement.rule.sent_down(round, False)
    out = rounded_prepared(sent, agreement.compression, ever)
    lost = sum(norm(difference(x, out.adapter[name])) ** 2 for name, x in sent.adapter.items())
    meant = sum(norm(x) ** 2 for x in sent.adapter.values())
    return out, _share(lost, meant)

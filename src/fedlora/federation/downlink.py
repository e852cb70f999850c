"""Rounds what the server hands out to be kept, and keeps what rounding has lost for a later round.

What clients keep of the global model (what is merged into its frozen side, and what is appended to
an adapter that they follow) is rounded before the server itself takes it in. So everybody has the
same model to the bit, and what is lost is not in it: the server adds it to what it hands out next.
An adapter that is sent anew in every round needs nothing of the kind. It is rounded on its way
(`compression.rounded_prepared`), while the server's own stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedlora.federation.compression import difference, rounded_prepared, rounded_update
from fedlora.federation.exchange import Agreement
from fedlora.federation.participants import Federation
from fedlora.lowrank import (
    Adapter,
    Delta,
    Deltas,
    LowRank,
    add,
    balance,
    cheaper_form,
    concat,
    norm,
    prefix,
    refactor,
)
from fedlora.methods.tracking import divided
from fedlora.methods.values import Prepared
from fedlora.threads import one_thread

_NEGLIGIBLE = 1e-5  # relative; a stack of rounded updates is rounded again without further loss


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
        known: directions that everybody has. What a change says of them is a few numbers, which
            are not rounded.
    """
    compression, rank = federation.agreement.compression, max(federation.ranks)
    if compression == "none":
        return Rounded(dict(changes))
    deltas, missing, lost, meant = dict[str, Delta](), dict[str, Delta](), 0.0, 0.0
    for name in dict.fromkeys([*changes, *unsent]):
        x = cheaper_form(add([group[name] for group in (changes, unsent) if name in group]))
        beside, free = _apart(x, (known or {}).get(name))
        sent = rounded_update(free, compression)
        deltas[name] = sent if beside is None else _joined(beside, sent)
        rest, size = difference(free, sent), norm(x)
        missed = norm(rest)
        lost, meant = lost + missed**2, meant + size**2
        if federation.compression_feedback and missed > _NEGLIGIBLE * size:
            kept = prefix(refactor(rest), rank) if isinstance(rest, LowRank) else rest
            missing[name] = kept
    return Rounded(deltas, missing, (lost / meant) ** 0.5 if meant else 0.0)


def _apart(x: Delta, known: LowRank | None) -> tuple[LowRank | None, Delta]:
    """What an update says of known directions, and the rest of it."""
    if known is None or not isinstance(x, LowRank):
        return None, x
    stack, weights = divided(x, known)
    directions = prefix(balance(known), len(weights))
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
    return out, float((lost / meant) ** 0.5) if meant else 0.0

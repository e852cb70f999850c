"""Rounds what a client sends, and keeps what rounding has lost for its next update.

With T what a client means to send and Q what `federation.compression` makes of it,

    T_t = update_t + lost_(t-1)        sent_t = Q(T_t)        lost_t = T_t - sent_t

so that what is lost in one round comes in later ones (error feedback; Seide et al., Interspeech
2014; Karimireddy et al., ICML 2019, arXiv 1901.09847). What T is depends on the rule
(`Rule.feedback`):

    product   T = B A. Of two factors of one product it is the product that the rule reads, so T may
              be given other factors: with what was lost before it has twice the rank, and its
              leading r directions are sent, balanced. Of what is lost r directions are kept.
    factors   T is every factor that is sent, number by number.
    none      nothing is kept: a direction of the next round is another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedlora.federation.compression import Compression, rounded, rounded_update
from fedlora.federation.exchange import Agreement
from fedlora.federation.messages import ClientState, ClientUpdate
from fedlora.lowrank import (
    Adapter,
    LowRank,
    balance,
    concat,
    prefix,
    refactor,
    total_norm,
)
from fedlora.methods.shared import change
from fedlora.methods.values import Start
from fedlora.threads import one_thread

ERROR = "compression_error"
"""The metric of a client's update that tells how much of it rounding has lost."""

_LOST = "lost/"


@dataclass(frozen=True)
class Sent:
    """An update as the server reads it.

    Args:
        update: with the rounded numbers, and `compression_error` among its metrics:
            `||T - sent||_F` over `||what the client learnt||_F`, of products or, where the rule
            feeds factors back, of the factors that are sent.
        lost: what the client's state keeps of it, by name.
    """

    update: ClientUpdate
    lost: Mapping[str, Tensor]


@one_thread()
def compressed(
    update: ClientUpdate,
    start: Start,
    state: ClientState | None,
    agreement: Agreement,
    *,
    feedback: bool = True,
) -> Sent:
    """What a client sends, rounded as the federation has agreed.

    Args:
        update: what it has trained.
        start: what it started from.
        state: what it has kept of its last update.
        agreement: of the federation.
        feedback: whether what is lost is made up for.
    """
    compression, how = agreement.compression, agreement.rule.feedback
    if compression == "none" or not update.adapter:
        return Sent(update, {})
    before = {} if state is None or not feedback else _kept(state)
    if how == "product" and update.sends == "AB":
        adapter, lost, size = _products(update.adapter, before, compression)
        learnt = total_norm(change(update.adapter, start.adapter))
    else:
        adapter, lost, size = _factors(update, before, compression)
        learnt = _norm_of_factors(update, start)
    error = size / learnt if learnt > 0 else 0.0
    metrics = {**update.metrics, ERROR: error}
    kept = {} if how == "none" or not feedback else {_LOST + name: x for name, x in lost.items()}
    return Sent(replace(update, adapter=adapter, metrics=metrics), kept)


def _kept(state: ClientState) -> dict[str, Tensor]:
    """What was lost, by factor and module."""
    return {
        name.removeprefix(_LOST): value
        for name, value in state.factors.items()
        if name.startswith(_LOST)
    }


def _products(
    adapter: Adapter, before: Mapping[str, Tensor], compression: Compression
) -> tuple[dict[str, LowRank], dict[str, Tensor], float]:
    """The rounded adapter, the factors of what is lost of its products, and the norm of that."""
    sent, lost, size = dict[str, LowRank](), dict[str, Tensor](), dict[str, LowRank]()
    for name, x in adapter.items():
        wanted, rank = x, x.rank
        if f"A/{name}" in before:
            wanted = concat([x, LowRank(before[f"A/{name}"], before[f"B/{name}"])])
            x = balance(prefix(refactor(wanted), rank))
            x = LowRank(*(value.contiguous() for value in (x.A, x.B)))
        arrived = rounded_update(x, compression)
        assert isinstance(arrived, LowRank), "made of factors"
        missing = refactor(concat([wanted, LowRank(arrived.A, -arrived.B)]))
        sent[name], size[name], kept = arrived, missing, prefix(missing, rank)
        lost[f"A/{name}"], lost[f"B/{name}"] = kept.A.contiguous(), kept.B.contiguous()
    return sent, lost, total_norm(size)


def _factors(
    update: ClientUpdate, before: Mapping[str, Tensor], compression: Compression
) -> tuple[dict[str, LowRank], dict[str, Tensor], float]:
    """The adapter with the factors that are sent rounded, what is lost of them, and its norm."""
    sent, lost, square = dict[str, LowRank](), dict[str, Tensor](), 0.0
    for name, x in update.adapter.items():
        factors = {"A": x.A, "B": x.B}
        for factor in update.sends:
            wanted = factors[factor]
            kept = before.get(f"{factor}/{name}")
            if kept is not None:
                wanted = wanted + _cut(kept, wanted.shape)
            factors[factor] = rounded(wanted, compression, axis="AB".index(factor))
            lost[f"{factor}/{name}"] = wanted - factors[factor]
            square += float(lost[f"{factor}/{name}"].double().square().sum())
        sent[name] = LowRank(factors["A"], factors["B"])
    unsent = {key: value for key, value in before.items() if key not in lost}
    return sent, unsent | lost, math.sqrt(square)


def _cut(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The rows and columns that a client still has which has pruned its rank."""
    return value[: shape[0], : shape[1]]


def _norm_of_factors(update: ClientUpdate, start: Start) -> float:
    """The norm of what the factors that are sent have changed by."""
    total = 0.0
    for name, x in update.adapter.items():
        began = prefix(start.adapter[name], x.rank)
        moved = {"A": (x.A, began.A), "B": (x.B, began.B)}
        for factor in update.sends:
            now, before = moved[factor]
            total += float((now.double() - before.double()).square().sum())
    return math.sqrt(total)

"""Refuses what a federation cannot work with: combinations of settings, and updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlora.errors import InputError
from fedlora.federation.exchange import Agreement
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.methods import METHODS
from fedlora.methods.rule import Rule


def check_rule(rule: Rule, ranks: Sequence[int]) -> None:
    """Refuse mixed ranks where a rule cannot combine them.

    Raises:
        InputError: which rule, which ranks, and what to do.
    """
    if not rule.mixed_ranks and len(set(ranks)) > 1:
        able = ", ".join(name for name, other in METHODS.items() if other.mixed_ranks)
        raise InputError(
            f"method: {rule.name} needs one rank for all clients, got client_ranks "
            f"{' '.join(map(str, ranks))}; use one rank, or a method that combines different ranks "
            f"({able})"
        )


def check_server_step(rule: Rule, learning_rate: float, momentum: float) -> None:
    """Refuse a server optimiser where a rule's sum is no change to step along.

    Raises:
        InputError: which rule, and what to do.
    """
    if (learning_rate != 1.0 or momentum) and not rule.server_optimiser:
        raise InputError(
            f"method: {rule.name} divides by weights of its own, so server_learning_rate and "
            "server_momentum have no meaning with it; leave them out"
        )
    if momentum and not rule.server_momentum:
        raise InputError(
            f"method: {rule.name} trains something else in every round, so the momentum of the "
            "round before has no meaning; leave server_momentum out"
        )


def check_shapes(update: ClientUpdate, sent: Broadcast, agreement: Agreement) -> None:
    """Refuse an update of modules, shapes, ranks or dense parameters that nobody asked for.

    Raises:
        ValueError: whose it is.
    """
    client, rank = update.client, _expected_rank(update, sent, agreement)
    modules = agreement.shapes if sent.modules is None else sent.modules
    asked = {name: (agreement.shapes[name], rank) for name in modules}
    if {name: (x.shape, x.rank) for name, x in update.adapter.items()} != asked:
        raise ValueError(
            f"client {client} sent modules, shapes or ranks other than those asked for"
        )
    if _shapes(update.dense) != _shapes(sent.dense):
        raise ValueError(f"client {client} sent dense parameters other than those asked for")


def _expected_rank(update: ClientUpdate, sent: Broadcast, agreement: Agreement) -> int:
    """The rank asked for; a client that may prune chooses a smaller one, the same everywhere."""
    largest = max((x.rank for x in update.adapter.values()), default=sent.rank)
    if agreement.training.prunes and 1 <= largest <= sent.rank:
        return largest
    return sent.rank


def _shapes(dense: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in dense.items()}


def not_finite(update: ClientUpdate) -> str:
    """The module or parameter where training ended in NaN or Inf, or "".

    Of a factor that is not sent the shape alone counts.
    """
    for name, x in update.adapter.items():
        sent = [value for factor, value in (("A", x.A), ("B", x.B)) if factor in update.sends]
        if not all(value.isfinite().all() for value in sent):
            return name
    for name, value in update.dense.items():
        if not value.isfinite().all():
            return name
    return ""

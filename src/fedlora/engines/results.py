"""Makes an engine's result of what a client was sent and what it sent back."""

from __future__ import annotations

from functools import partial

from fedlora.federation.exchange import Agreement, client_start, server_view
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.lowrank import Deltas, add_all
from fedlora.methods.rule import Shapes
from fedlora.runs.engine import ClientResult


def asked_modules(broadcast: Broadcast, shapes: Shapes) -> Shapes:
    """The shapes of the modules that a client was asked to train, in the federation's order."""
    asked = broadcast.modules
    return shapes if asked is None else {n: shapes[n] for n in shapes if n in asked}


def result_of(broadcast: Broadcast, update: ClientUpdate, agreement: Agreement) -> ClientResult:
    """The result of a client that trained elsewhere; its model is computed when it is asked for."""
    return ClientResult(update, partial(_model, broadcast, update, agreement))


def _model(broadcast: Broadcast, update: ClientUpdate, agreement: Agreement) -> Deltas:
    """The model a client ended with, from what it was sent and what it sent back."""
    start = client_start(broadcast, agreement)
    return add_all([broadcast.base_delta, start.shared, start.private, server_view(update, start)])

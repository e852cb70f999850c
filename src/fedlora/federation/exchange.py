"""Computes what both sides make of a message, by pure functions of what both of them have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedlora.federation.compression import Compression
from fedlora.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlora.lowrank import Deltas, LowRank, add_all, concat, prefix, wide
from fedlora.methods.rule import Fresh, Rule, Shapes
from fedlora.methods.values import DENSE, Encoded, ServerState, Start, Training
from fedlora.seeds import SERVER, Purpose, fresh_factors


@dataclass(frozen=True)
class Agreement:
    """What the server and all clients of a federation have to agree on, made once and handed on.

    From it and from the messages both sides compute the same starts and encoded updates.

    Args:
        rule: how updates are combined.
        options: the rule's own options, an instance of `rule.options`.
        shapes: target module -> `(m, n)`.
        seed: of every draw.
        compression: what numbers are rounded to on their way.
    """

    rule: Rule
    options: Any
    shapes: Shapes
    seed: int = 0
    compression: Compression = "none"

    @property
    def training(self) -> Training:
        """What the rule asks of the local training."""
        return self.rule.training(self.options)

    @property
    def followed(self) -> bool:
        """Whether clients keep the global adapter, and are sent what has changed of it."""
        return self.rule.followed(self.options)

    @property
    def fixed_weight(self) -> float | None:
        """The constant that replaces every client's weight; None where weights are shares."""
        return self.rule.fixed_weight(self.options)

    @property
    def shared_factors(self) -> Fresh:
        """The initial A of the global adapter, which every client can draw for itself."""
        return fresh_factors(self.seed, 0, SERVER, Purpose.SHARED_INIT, self.shapes)

    def client_factors(self, round: int, client: int) -> Fresh:
        """The fresh A of one client in one round."""
        return fresh_factors(self.seed, round, client, Purpose.CLIENT_INIT, self.shapes)

    @property
    def digest(self) -> str:
        """SHA-256 over the agreement as canonical JSON, in hex, for two sides to compare.

        Neither the order of modules nor whether an option is written 1 or 1.0 changes it.
        """
        options = {
            key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            for key, value in asdict(self.options).items()
        }
        agreed: dict[str, Any] = {
            "rule": self.rule.name,
            "options": options,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "seed": self.seed,
        }
        if self.compression != "none":
            agreed["compression"] = self.compression
        text = json.dumps(agreed, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def global_delta(state: ServerState) -> Deltas:
    """The global model's difference from the base, `base_delta + adapter`."""
    return add_all([state.base_delta, state.adapter])


def client_start(
    broadcast: Broadcast, agreement: Agreement, own: ClientState | None = None
) -> Start:
    """What client k makes of its broadcast: what it trains, and what lies frozen beside it.

    Args:
        broadcast: what it was sent.
        agreement: of the federation.
        own: factors that the client keeps for itself. Only the client can put them in; the start
            that the server reckons with, and that updates are encoded against, is without them.
    """
    start = agreement.rule.client_init(
        broadcast.adapter,
        broadcast.leading,
        agreement.shapes,
        broadcast.rank,
        agreement.client_factors(broadcast.round, broadcast.client),
        agreement.options,
    )
    if own is not None:
        start = _with_own_factors(start, own)
    if broadcast.modules is not None:
        start = _training_only(start, broadcast.modules)
    return start


def _with_own_factors(start: Start, own: ClientState) -> Start:
    """The start with the client's own B in the place of the one that was sent."""
    adapter = {
        name: LowRank(x.A, own.factors.get(f"{name}.B", x.B)) for name, x in start.adapter.items()
    }
    return replace(start, adapter=adapter)


def _training_only(start: Start, modules: Set[str]) -> Start:
    """The start with every other module frozen as it was sent.

    Where the whole global update lies frozen under all clients (`shared`), `private` is what takes
    the trained directions off it; who trains nothing there takes nothing off. Elsewhere the
    directions that would have been trained join what is frozen.
    """
    trained, private = dict(start.adapter), dict(start.private)
    for name in [name for name in start.adapter if name not in modules]:
        x = trained.pop(name)
        if name in start.shared:
            del private[name]
        else:
            private[name] = concat([private[name], x]) if name in private else x
    return Start(trained, private, start.shared)


def server_view(update: ClientUpdate, start: Start) -> dict[str, LowRank]:
    """A client's factors as the server knows them: what is not sent is what it started from.

    Args:
        update: what the client sent.
        start: of `client_start`, without what the client keeps for itself.
    """
    out = {}
    for name, x in update.adapter.items():
        began = prefix(start.adapter[name], x.rank)
        a, b = wide(x.A), wide(x.B)
        out[name] = LowRank(
            a if "A" in update.sends else began.A.to(a), b if "B" in update.sends else began.B.to(b)
        )
    return out


def encode_update(
    update: ClientUpdate, start: Start, broadcast: Broadcast, agreement: Agreement
) -> Encoded:
    """What the rule needs of an update, with the change of the parameters that are trained whole.

    A pure function of what a client has, so that client and server compute the same.

    Args:
        update: what the client sends, or would send.
        start: of `client_start`, without what the client keeps for itself.
        broadcast: what it was sent.
        agreement: of the federation.
    """
    encoded = agreement.rule.encode(
        server_view(update, start), start, broadcast.numbers, agreement.options
    )
    dense = {
        DENSE + name: wide(value) - wide(broadcast.dense[name])
        for name, value in update.dense.items()
    }
    return replace(encoded, factors={**encoded.factors, **dense})

"""Defines what travels between the server and the clients, and what the server remembers.

The global model is `W_0 + base_delta + adapter`. All values are immutable: a round makes new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedlora.lowrank import Adapter, Deltas, add_all, factor_bytes


@dataclass(frozen=True)
class Broadcast:
    """What the server sends one client at the beginning of a round.

    Args:
        round: counted from 1.
        client: whom it is for.
        rank: the rank of the adapter this client is to train.
        adapter: the global adapter; empty where the rule resets it.
        leading: the leading directions of `adapter`, which starts are cut from: the adapter
            itself where that is factors, some directions of it where it is dense.
        base_delta: the frozen side so far, `W_0 + base_delta` being what is not trained.
        dense: parameters averaged as they are (a classifier head).
        nbytes: bytes that have to be transferred: what this client does not hold already.
        modules: the target modules it trains; None = all.
    """

    round: int
    client: int
    rank: int
    adapter: Deltas
    leading: Adapter
    base_delta: Deltas
    dense: Mapping[str, Tensor]
    nbytes: int
    modules: frozenset[str] | None = None


@dataclass(frozen=True)
class Start:
    """What a client makes of a broadcast: what it trains, and what lies frozen beside.

    Args:
        adapter: what it trains.
        own: what is frozen and its own, as factors of small rank.
        beneath: what is frozen and common to all clients of the round, the broadcast's `adapter`
            itself, so that it has to be added to the base only once.
    """

    adapter: Adapter
    own: Adapter = field(default_factory=dict)
    beneath: Deltas = field(default_factory=dict)

    @property
    def rest(self) -> Deltas:
        """All that lies frozen beside the adapter, `beneath + own`."""
        return add_all([self.beneath, self.own])


@dataclass(frozen=True)
class ClientState:
    """What outlives a round at a client, and never leaves it.

    Args:
        factors: `module.B` -> the factor it goes on training, scale folded.
    """

    factors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back.

    Args:
        client: who trained it.
        round: the round it belongs to.
        adapter: the trained factors, scale folded into `B`; of a factor that is not sent the
            shape alone counts.
        num_examples: rows it was trained on; the weight under `client_weights: examples`.
        dense: trained values of the dense parameters.
        metrics: what the local training reports (`loss`, `steps`, `tokens`, `seconds` ...).
        sends: the factors that travel, "AB", "A" or "B".
    """

    client: int
    round: int
    adapter: Adapter
    num_examples: int
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    sends: str = "AB"

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return factor_bytes(self.adapter, self.sends) + sum(t.nbytes for t in self.dense.values())


@dataclass(frozen=True)
class Encoded:
    """What a rule needs of an update, or a weighted sum of that.

    Args:
        factors: tensors that are summed element by element.
        products: low-rank updates that are summed as matrices, `sum_k p_k dW_k`.
    """

    factors: Mapping[str, Tensor] = field(default_factory=dict)
    products: Deltas = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """The outcome of a rule: the next trainable global adapter, and what is merged for good.

    Args:
        adapter: the global adapter of the next round; empty = fresh LoRA initialisation.
        merge: what is added to the frozen side `base_delta`; empty = nothing.
    """

    adapter: Deltas
    merge: Deltas = field(default_factory=dict)


@dataclass(frozen=True)
class ServerState:
    """All the server knows between two rounds; what a checkpoint holds.

    Args:
        round: rounds committed so far.
        adapter: the global adapter (in full, whatever was sent of it).
        base_delta: what was merged into the frozen side.
        dense: averaged dense parameters.
        last_merge: what the last committed round added to `base_delta`.
        last_seen: client -> last round it was sent a broadcast for.
        momentum: the server optimiser's velocity.
        ranks: client -> its rank, as far as it has pruned it.
    """

    round: int
    adapter: Deltas
    base_delta: Deltas = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    last_merge: Deltas = field(default_factory=dict)
    last_seen: Mapping[int, int] = field(default_factory=dict)
    momentum: Encoded = field(default_factory=Encoded)
    ranks: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientRecord:
    """One client's part in a round, for the log."""

    client: int
    rank: int
    num_examples: int
    weight: float
    bytes_down: int
    bytes_up: int
    metrics: Mapping[str, Any]
    rejected: str = ""


@dataclass(frozen=True)
class LayerRecord:
    """One target module in a round, for the log.

    Args:
        error: as `RoundRecord.aggregation_error`, of this module alone.
        norm: the Frobenius norm of its change.
    """

    error: float | None
    norm: float


@dataclass(frozen=True)
class RoundRecord:
    """One committed round, for the log.

    Args:
        round: counted from 1.
        clients: one record each, in client order.
        aggregation_error: `||dG - sum_k p_k (M_k - M_k_start)||` over the norm of that sum, with dG
            the change of the global model and M_k the product client k ended with; None with a
            server optimiser (its step is not meant to be that sum) or where nothing was learnt.
            Rounding S to float32 sets a floor of about `4e-7 ||S|| / ||dG||`.
        truncation_error: `||S - S_hat|| / ||S||` of what was sent, where a rule truncates it.
        update_norm: the Frobenius norm of dG over all modules.
        global_rank: the largest rank bound of a module of the global update.
        layers: target module -> its part; of modules with more than 256 directions the norms are
            estimates, within 10%.
    """

    round: int
    clients: tuple[ClientRecord, ...]
    aggregation_error: float | None
    truncation_error: float
    update_norm: float
    global_rank: int
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)

    @property
    def bytes_down(self) -> int:
        """Bytes sent to all clients of the round."""
        return sum(c.bytes_down for c in self.clients)

    @property
    def bytes_up(self) -> int:
        """Bytes received from all clients of the round."""
        return sum(c.bytes_up for c in self.clients)

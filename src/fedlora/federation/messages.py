"""Defines what travels between server and clients, and what a client keeps to itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedlora.federation.compression import Compression, packed_bytes
from fedlora.lowrank import Adapter, Deltas, LowRank
from fedlora.methods.rule import Shapes
from fedlora.methods.values import RoundNumbers


@dataclass(frozen=True)
class Broadcast:
    """What the server sends one client at the beginning of a round.

    Args:
        round: counted from 1.
        client: whom it is for.
        rank: the rank of the adapter this client is to train.
        adapter: the global adapter; empty where the rule resets it.
        leading: the leading directions of `adapter`, which starts are cut from: the adapter
            itself, or some directions of it.
        base_delta: the frozen side so far, `W_0 + base_delta` being what is not trained.
        dense: parameters averaged as they are (a classifier head).
        nbytes: bytes that have to be transferred: what this client does not hold already.
        numbers: the round's public numbers, which updates are encoded by.
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
    numbers: RoundNumbers
    modules: frozenset[str] | None = None


@dataclass(frozen=True)
class Lacking:
    """What a client lacks of a broadcast, and has to be sent.

    Args:
        held: the round whose global model it holds; None: none.
        tensors: by where they belong. Of a rule whose adapter clients keep,
            `increment/round/module/part` or `whole/module/part` and its `basis`; of others
            `adapter/module/factor` and `leading/module/factor`; `merge/round/module/factor` or
            `merged/module/factor`; and `dense/name`.
        places: of a factor that the seed gives but for some rows of A or columns of B,
            `beyond/module/factor`: which.
        compression: what the tensors were rounded to, as far as they were.
    """

    held: int | None
    tensors: Mapping[str, Tensor]
    places: Mapping[str, Sequence[int]] = field(default_factory=dict)
    compression: Compression = "none"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they travel."""
        return packed_bytes(self.tensors, self.compression)


@dataclass(frozen=True)
class ClientState:
    """What outlives a round at a client, and never leaves it.

    Args:
        factors: `module.B` -> the factor it goes on training, scale folded; and `lost/A/module`,
            `lost/B/module`: what compression has lost of its last update (`federation.uplink`).
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
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that travel: `A/module` and `B/module`, as far as sent, and `dense/name`."""
        adapter = self.adapter.items()
        return {
            **({f"A/{name}": x.A for name, x in adapter} if "A" in self.sends else {}),
            **({f"B/{name}": x.B for name, x in adapter} if "B" in self.sends else {}),
            **{f"dense/{name}": value for name, value in self.dense.items()},
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that travel, where none of them is packed in fewer."""
        return sum(value.nbytes for value in self.tensors.values())


def adapter_of(tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, LowRank]:
    """The adapter in `ClientUpdate.tensors`; zeros in the place of a factor that did not travel.

    Args:
        tensors: `A/module (r, n)` and `B/module (m, r)`, at least one of the two for every module.
        shapes: target module -> `(m, n)`, in the order wanted.
    """
    adapter = {}
    for name, (m, n) in shapes.items():
        a, b = tensors.get(f"A/{name}"), tensors.get(f"B/{name}")
        if a is None:
            assert b is not None
            a = b.new_zeros(b.shape[1], n)
        elif b is None:
            b = a.new_zeros(m, a.shape[0])
        adapter[name] = LowRank(a, b)
    return adapter

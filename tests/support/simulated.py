"""Simulated clients, and matrices in float64 to check a server against.

A client starts where the rule says, moves the factors it is asked to train by a random step, leaves
the others as they are, sends what it is asked for (zeros in the place of the rest), keeps what it
is to keep, and prunes its rank where the rule lets it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import Agreement, client_start, global_delta
from fedlora.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlora.federation.participants import Federation
from fedlora.federation.records import RoundRecord
from fedlora.federation.server import Server, initial_state
from fedlora.lowrank import Adapter, Delta, Deltas, Dense, LowRank, prefix
from fedlora.methods import METHODS
from fedlora.methods.rule import Rule
from fedlora.methods.values import ServerState, Start, Training

F64 = torch.float64


# Higher than wide, wider than high, square. Held as factors up to rank 5 (attn) and 2 (gate), so
# that some states turn dense and some ranks exceed a dimension; `wide` stays as factors up to 30.
SHAPES = {"attn": (12, 9), "gate": (3, 8), "wide": (60, 60)}


Matrices = dict[str, Tensor]


Kept = MutableMapping[int, ClientState]


def matrix(x: Delta) -> Tensor:
    return x.W.double() if isinstance(x, Dense) else x.B.double() @ x.A.double()


def matrices(deltas: Deltas) -> Matrices:
    """Every module's matrix in float64, zero where it is not named."""
    zero = {name: torch.zeros(shape, dtype=F64) for name, shape in SHAPES.items()}
    return {**zero, **{name: matrix(x) for name, x in deltas.items()}}


def combine(*terms: tuple[float, Matrices]) -> Matrices:
    return {name: sum(w * term[name] for w, term in terms) for name in SHAPES}


def size(values: Matrices) -> float:
    return float(torch.stack([v.norm() for v in values.values()]).norm())


def distance(x: Matrices, y: Matrices) -> float:
    return size(combine((1.0, x), (-1.0, y)))


def model(server: Server) -> Matrices:
    """The global model's difference from the base."""
    return matrices(global_delta(server.state))


def random(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def random_adapter(rank: int, seed: int, dtype: torch.dtype = F64) -> dict[str, LowRank]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(random((rank, n), g, dtype), random((m, rank), g, dtype))
        for name, (m, n) in SHAPES.items()
    }


def ranks_for(rule: Rule) -> list[int]:
    """Four ranks, mixed where the rule can combine them."""
    return [4, 1, 2, 6] if rule.mixed_ranks else [3, 3, 3, 3]


def _cast(x: Delta, dtype: torch.dtype) -> Delta:
    return Dense(x.W.to(dtype)) if isinstance(x, Dense) else LowRank(x.A.to(dtype), x.B.to(dtype))


def serve(
    method: str | Rule,
    ranks: Sequence[int] = (3, 3, 3, 3),
    given: Adapter | None = None,
    *,
    dense: Mapping[str, Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = F64,
    **how: Any,
) -> Server:
    """A server before round 1, its state in `dtype`; client k has 10 + 7 k rows."""
    rule = METHODS[method] if isinstance(method, str) else method
    how.setdefault("num_examples", [10 + 7 * k for k in range(len(ranks))])
    agreement = Agreement(rule, rule.options(**(options or {})), SHAPES, how.pop("seed", 5))
    federation = Federation(ranks, agreement=agreement, **how)
    state = initial_state(federation, given, dense)
    state = replace(
        state,
        adapter={n: _cast(x, dtype) for n, x in state.adapter.items()},
        base_delta={n: _cast(x, dtype) for n, x in state.base_delta.items()},
    )
    return Server(federation, state, Mean())


def start_of(server: Server, sent: Broadcast, own: ClientState | None = None) -> Start:
    return client_start(sent, server.agreement, own)


def _tail(adapter: Adapter, asked: Training) -> float:
    return sum(
        float(x.B[:, t:].norm() * x.A[t:].norm())
        for x in adapter.values()
        for t in [int(asked.tail_from * x.rank)]
    )


def answer(
    server: Server, sent: Broadcast, trained: Adapter, kept: Kept | None = None
) -> ClientUpdate:
    """What a client sends that has ended with these factors."""
    asked = server.agreement.training
    sends = asked.sent(sent.round)
    if asked.keeps and kept is not None:
        kept[sent.client] = ClientState({f"{n}.B": x.B for n, x in trained.items()})
    only = {
        name: LowRank(
            x.A if "A" in sends else torch.zeros_like(x.A),
            x.B if "B" in sends else torch.zeros_like(x.B),
        )
        for name, x in trained.items()
    }
    rows = server.federation.num_examples[sent.client]
    return ClientUpdate(sent.client, sent.round, only, rows, dict(sent.dense), sends=sends)


def moved(
    server: Server,
    sent: Broadcast,
    seed: int = 0,
    dtype: torch.dtype = F64,
    kept: Kept | None = None,
    step: float = 0.5,
) -> dict[str, LowRank]:
    """What a client ends with: its start, the trained factors moved by a random step."""
    asked = server.agreement.training
    trains = asked.trained(sent.round)
    start = start_of(server, sent, (kept or {}).get(sent.client)).adapter
    g = torch.Generator().manual_seed(seed * 1009 + sent.round * 101 + sent.client)
    ended = {}
    for name, x in start.items():
        a, b = step * random(x.A.shape, g, dtype), step * random(x.B.shape, g, dtype)
        ended[name] = LowRank(
            x.A.to(dtype) + a * ("A" in trains), x.B.to(dtype) + b * ("B" in trains)
        )
    if asked.prunes and _tail(ended, asked) < _tail(start, asked):
        rank = max(1, int(asked.tail_from * sent.rank))
        ended = {name: prefix(x, rank) for name, x in ended.items()}
    return ended


def train(
    server: Server,
    sent: Broadcast,
    seed: int = 0,
    dtype: torch.dtype = F64,
    kept: Kept | None = None,
) -> ClientUpdate:
    """An honest client's update."""
    return answer(server, sent, moved(server, sent, seed, dtype, kept), kept)


def idle(server: Server, sent: Broadcast, dtype: torch.dtype = F64) -> ClientUpdate:
    """The update of a client that has learnt nothing."""
    return answer(server, sent, moved(server, sent, dtype=dtype, step=0.0))


def ended(start: Start, update: ClientUpdate) -> dict[str, LowRank]:
    """A client's factors as the server can know them: what was not sent has not moved."""
    out = {}
    for name, x in update.adapter.items():
        began = prefix(start.adapter[name], x.rank)
        out[name] = LowRank(
            x.A if "A" in update.sends else began.A.to(x.A),
            x.B if "B" in update.sends else began.B.to(x.B),
        )
    return out


def learnt(start: Start, update: ClientUpdate) -> Matrices:
    """`M_k - M_k_start`."""
    return combine((1.0, matrices(ended(start, update))), (-1.0, matrices(start.adapter)))


@dataclass(frozen=True)
class Round:
    """One simulated round.

    `before` and `after` are the states. What follows from the messages is worked out when a test
    asks for it, and once.
    """

    agreement: Agreement
    before: ServerState
    sent: Mapping[int, Broadcast]
    updates: Mapping[int, ClientUpdate]
    weights: Mapping[int, float]
    record: RoundRecord
    after: ServerState

    @cached_property
    def starts(self) -> dict[int, Start]:
        """Where every client that was asked began, as the server can know it."""
        return {k: client_start(sent, self.agreement) for k, sent in self.sent.items()}

    @cached_property
    def ended(self) -> dict[int, dict[str, LowRank]]:
        """The factors the server reckons with."""
        return {k: ended(self.starts[k], update) for k, update in self.updates.items()}

    @cached_property
    def wanted(self) -> Matrices:
        """`sum_k p_k (M_k - M_k_start)`."""
        learnt_by = {k: learnt(self.starts[k], self.updates[k]) for k in self.weights}
        return combine(*[(p, learnt_by[k]) for k, p in self.weights.items()])

    @cached_property
    def size(self) -> float:
        """`sum_k p_k ||M_k||`."""
        return sum(p * size(matrices(self.ended[k])) for k, p in self.weights.items())

    @property
    def change(self) -> Matrices:
        """What became of the global model."""
        before, after = (matrices(global_delta(s)) for s in (self.before, self.after))
        return combine((1.0, after), (-1.0, before))

    @property
    def error(self) -> float:
        """The aggregation error, from matrices."""
        return distance(self.change, self.wanted) / size(self.wanted)


def close(server: Server, sent: Mapping[int, Broadcast], updates: Sequence[ClientUpdate]) -> Round:
    """Hand over the updates in the order given, and commit."""
    before = server.state
    for update in updates:
        assert server.accept(update) == ""
    total = sum(u.num_examples for u in updates)
    weights = {u.client: u.num_examples / total for u in sorted(updates, key=lambda u: u.client)}
    record = server.commit()
    told = {u.client: u for u in updates}
    return Round(server.agreement, before, sent, told, weights, record, server.state)


def play(
    server: Server,
    seed: int = 0,
    dtype: torch.dtype = F64,
    order: Sequence[int] | None = None,
    kept: Kept | None = None,
) -> Round:
    """One round in which all clients that are asked answer."""
    sent = server.plan()
    updates = {k: train(server, b, seed, dtype, kept) for k, b in sent.items()}
    return close(server, sent, [updates[k] for k in order or sent])

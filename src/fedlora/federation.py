"""The federated round as a state machine: plan, accept, commit.

    broadcasts = server.plan()                 # {client: Broadcast} of the next round
    server.accept(update)                      # once per client that answers, in any order
    record = server.commit()                   # fold, aggregate, advance

It knows no trainer, no model library and no network, so the same code runs in one process and under
any engine that can carry a message. Updates are folded in client order whatever the order they
arrive in, so that arrival changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.errors import InputError
from fedlora.lowrank import (
    Adapter,
    Deltas,
    LowRank,
    add,
    add_all,
    compact,
    factor_bytes,
    nbytes,
    prefix,
    scale_all,
    total_norm,
)
from fedlora.methods import METHODS
from fedlora.methods.rule import Prepared, Rule, Shapes, change
from fedlora.seeds import SERVER, Purpose, fresh_factors, generator
from fedlora.state import (
    Broadcast,
    ClientRecord,
    ClientState,
    ClientUpdate,
    Encoded,
    RoundRecord,
    ServerState,
    Start,
)


@dataclass(frozen=True)
class Federation:
    """Who takes part, and how the server weighs and steps.

    Args:
        ranks: the adapter rank of every client.
        num_examples: rows of every client; one with none is never asked.
        shapes: target module -> `(m, n)`.
        seed: of every draw.
        clients_per_round: None = all, an int = so many, a float in (0, 1] = that share.
        client_weights: "examples": p_k in proportion to the rows; "uniform": all alike.
        server_learning_rate: eta in `G' = G + eta v`.
        server_momentum: mu in `v = mu v + sum_k p_k encode_k` (FedAvgM, arXiv 1909.06335).
        modules: the target modules of clients that do not train all of them. What a client does
            not train stays as it is sent: it adds nothing to the sum, its weight counts in full
            (hetlora and raflora weigh module by module, over those who train it).
    """

    ranks: Sequence[int]
    num_examples: Sequence[int]
    shapes: Shapes
    seed: int = 0
    clients_per_round: int | float | None = None
    client_weights: Literal["examples", "uniform"] = "examples"
    server_learning_rate: float = 1.0
    server_momentum: float = 0.0
    modules: Mapping[int, frozenset[str]] = field(default_factory=dict)

    def trained_by(self, client: int) -> frozenset[str] | None:
        """The target modules a client trains; None = all."""
        return self.modules.get(client)

    def weight(self, num_examples: int) -> float:
        """A client's weight before normalisation."""
        rows = max(num_examples, 0)
        return float(rows > 0 if self.client_weights == "uniform" else rows)

    def sample(self, round: int) -> list[int]:
        """The clients of a round, in ascending order, drawn without replacement."""
        able = [k for k, rows in enumerate(self.num_examples) if rows > 0]
        wanted = self.clients_per_round
        if wanted is None:
            return able
        if isinstance(wanted, float):
            wanted = max(1, int(wanted * len(able) + 0.5))
        rng = generator(self.seed, round, SERVER, Purpose.SAMPLING)
        return sorted(rng.choice(able, size=min(wanted, len(able)), replace=False).tolist())


def initial_state(
    federation: Federation,
    rule: Rule,
    given: Adapter | None = None,
    dense: Mapping[str, Tensor] | None = None,
) -> ServerState:
    """The state before round 1, from nothing or from an adapter to go on from."""
    fresh = fresh_factors(federation.seed, 0, SERVER, Purpose.SHARED_INIT, federation.shapes)
    adapter, base_delta = rule.initial(
        federation.shapes, max(federation.ranks), fresh, dict(given or {})
    )
    ranks = dict(enumerate(federation.ranks))
    return ServerState(0, adapter, base_delta, dense=dict(dense or {}), ranks=ranks)


def global_delta(state: ServerState) -> Deltas:
    """The global model's difference from the base, `base_delta + adapter`."""
    return add_all([state.base_delta, state.adapter])


def client_start(
    broadcast: Broadcast,
    rule: Rule,
    options: Any,
    shapes: Shapes,
    seed: int,
    own: ClientState | None = None,
) -> Start:
    """What client k makes of its broadcast, by the rule; a pure function, run on both sides.

    What a client keeps for itself (`own`) it alone can put in; the server's start is without it.
    """
    fresh = fresh_factors(seed, broadcast.round, broadcast.client, Purpose.CLIENT_INIT, shapes)
    start = rule.start(broadcast.adapter, broadcast.leading, shapes, broadcast.rank, fresh, options)
    if own is not None:
        kept = {n: own.factors.get(f"{n}.B", x.B) for n, x in start.adapter.items()}
        start = replace(start, adapter={n: LowRank(x.A, kept[n]) for n, x in start.adapter.items()})
    if broadcast.modules is None:
        return start
    frozen, trained = dict(start.own), dict(start.adapter)
    for name in start.adapter.keys() - broadcast.modules:
        x = trained.pop(name)
        if name in start.beneath:  # there `own` is what the adapter takes off it
            frozen.pop(name)
        else:
            frozen[name] = add([frozen[name], x]) if name in frozen else x
    return Start(trained, frozen, start.beneath)


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


def received(update: ClientUpdate, start: Start) -> dict[str, LowRank]:
    """A client's factors as the server knows them: what is not sent is what it started from."""
    out = {}
    for name, x in update.adapter.items():
        began = prefix(start.adapter[name], x.rank)
        a, b = _wide(x.A), _wide(x.B)
        out[name] = LowRank(
            a if "A" in update.sends else began.A.to(a), b if "B" in update.sends else began.B.to(b)
        )
    return out


_DENSE = "dense/"
"""Marks dense parameters among the factors of a sum: they are averaged like them, by every rule."""


class WeightedSum:
    """`sum_k w_k x_k` and `sum_k w_k`, folded one update at a time."""

    def __init__(self) -> None:
        self.factors: dict[str, Tensor] = {}
        self.products: Deltas = {}
        self.ideal: Deltas = {}
        self.weight = 0.0

    def fold(self, encoded: Encoded, learnt: Deltas, weight: float) -> None:
        for name, value in encoded.factors.items():
            term = value * weight
            self.factors[name] = self.factors[name] + term if name in self.factors else term
        self.products = add_all([self.products, scale_all(encoded.products, weight)])
        self.ideal = add_all([self.ideal, scale_all(learnt, weight)])
        self.weight += weight

    def mean(self, fixed: bool = False) -> Encoded:
        """The sum over the weights that counted; a rule's fixed weights are not normalised."""
        whole = 1.0 / self.weight
        inverse = 1.0 if fixed else whole
        return Encoded(
            {
                name: value * (whole if name.startswith(_DENSE) else inverse)
                for name, value in self.factors.items()
            },
            scale_all(self.products, inverse),
        )


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _step(total: Encoded, velocity: Encoded, rate: float, momentum: float) -> tuple[Encoded, ...]:
    """`v = mu v + total`; returns what is applied, `eta v`, and `v`."""
    if momentum:
        factors = {name: momentum * value for name, value in velocity.factors.items()}
        for name, value in total.factors.items():
            factors[name] = value + factors[name] if name in factors else value
        products = add_all([total.products, scale_all(velocity.products, momentum)])
        total = velocity = Encoded(factors, {n: compact(x) for n, x in products.items()})
    if rate != 1.0:
        factors = {name: rate * value for name, value in total.factors.items()}
        total = Encoded(factors, scale_all(total.products, rate))
    return total, velocity


class Server:
    """One federation in progress.

    Args:
        federation: who takes part.
        rule: how updates are combined.
        options: the rule's own options.
        state: where it stands; `state` is replaced by `commit`, never changed in place.
    """

    def __init__(
        self, federation: Federation, rule: Rule, options: Any, state: ServerState
    ) -> None:
        check_rule(rule, federation.ranks)
        check_server_step(rule, federation.server_learning_rate, federation.server_momentum)
        self.fixed = rule.fixed_weight(options)
        self.federation = federation
        self.rule = rule
        self.options = options
        self.state = state
        self._open = False
        self._truncation_error = 0.0
        self._broadcasts: dict[int, Broadcast] = {}
        self._updates: dict[int, ClientUpdate] = {}
        self._rejected: dict[int, str] = {}

    def plan(self) -> dict[int, Broadcast]:
        """Open the next round: whom it asks, and what each of them is sent."""
        prepared = self.rule.prepare(self.state, max(self.federation.ranks), self.options)
        self._open, self._truncation_error = True, prepared.error
        self._updates, self._rejected = {}, {}
        self._broadcasts = {
            client: self._broadcast(client, prepared)
            for client in self.federation.sample(self.state.round + 1)
        }
        return dict(self._broadcasts)

    def _broadcast(self, client: int, prepared: Prepared) -> Broadcast:
        state, rank = self.state, self._rank(client)
        sent = self.rule.cut(prepared, rank, self.options)
        beside = {n: x for n, x in sent.leading.items() if x is not sent.adapter[n]}
        # Who held the state of one round ago lacks only what that round merged.
        missing = nbytes(state.base_delta)
        if state.last_seen.get(client) == state.round and state.round > 0:
            missing = min(missing, nbytes(state.last_merge))
        dense = sum(t.nbytes for t in state.dense.values())
        number = state.round + 1
        seen = state.last_seen.get(client) == state.round and state.round > 0
        lacking = self.rule.sent_down(number, seen)
        return Broadcast(
            round=number,
            client=client,
            rank=rank,
            adapter=sent.adapter,
            leading=sent.leading,
            base_delta=state.base_delta,
            dense=state.dense,
            nbytes=factor_bytes(sent.adapter, lacking) + nbytes(beside) + missing + dense,
            modules=self.federation.trained_by(client),
        )

    def accept(self, update: ClientUpdate) -> str:
        """Take a client's update.

        Returns:
            Why it does not count (values that are not finite), or "" where it does.

        Raises:
            ValueError: it belongs to another round, was not asked for, was sent before, or its
                shapes are not those asked for.
        """
        client, sent = update.client, self._broadcasts.get(update.client)
        if sent is None or update.round != sent.round:
            raise ValueError(
                f"client {client} sent an update of round {update.round} that nobody asked for"
            )
        if client in self._updates or client in self._rejected:
            raise ValueError(f"client {client} is done with round {update.round} already")
        shapes = self.federation.shapes
        asked = shapes if sent.modules is None else {n: shapes[n] for n in sent.modules}
        rank = max((x.rank for x in update.adapter.values()), default=sent.rank)
        if not self.rule.training(self.options).prunes:
            rank = sent.rank
        if not 1 <= rank <= sent.rank or {
            n: (*x.shape, x.rank) for n, x in update.adapter.items()
        } != {n: (*s, rank) for n, s in asked.items()}:
            raise ValueError(
                f"client {client} sent modules, shapes or ranks other than those asked for"
            )
        if {n: t.shape for n, t in update.dense.items()} != {
            n: t.shape for n, t in self.state.dense.items()
        }:
            raise ValueError(f"client {client} sent dense parameters other than those asked for")
        bad = [
            name
            for name, x in update.adapter.items()
            if ("A" in update.sends and not torch.isfinite(x.A).all())
            or ("B" in update.sends and not torch.isfinite(x.B).all())
        ]
        bad += [name for name, t in update.dense.items() if not torch.isfinite(t).all()]
        self._updates[client] = update
        if bad:
            self._rejected[client] = f"its training ended in NaN or Inf ({bad[0]})"
        return self._rejected.get(client, "")

    def reject(self, client: int, reason: str) -> None:
        """Note that a client of this round failed; the round goes on without it."""
        self._rejected[client] = reason

    def commit(self) -> RoundRecord:
        """Close the round: fold what was accepted in client order, aggregate, advance the state.

        With no update that counts, the global model stays as it is.

        Raises:
            ValueError: no round is open.
        """
        if not self._open:
            raise ValueError("commit needs a round that plan has opened")
        before, total = self.state, WeightedSum()
        for client in sorted(self._updates.keys() - self._rejected.keys()):
            update, sent, spec = self._updates[client], self._broadcasts[client], self.federation
            weight = spec.weight(update.num_examples)
            if weight <= 0:
                continue
            start = client_start(sent, self.rule, self.options, spec.shapes, spec.seed)
            adapter = received(update, start)
            if self.fixed is not None:
                weight = self.fixed
            encoded = self.rule.encode(adapter, start, before, self.options)
            dense = {
                _DENSE + name: _wide(value) - _wide(before.dense[name])
                for name, value in update.dense.items()
            }
            encoded = replace(encoded, factors={**encoded.factors, **dense})
            total.fold(encoded, change(adapter, start.adapter), weight)
        after = self._advance(before, total)
        record = self._record(before, after, total)
        self.state, self._open = after, False
        self._broadcasts, self._updates, self._rejected = {}, {}, {}
        return record

    def _advance(self, before: ServerState, total: WeightedSum) -> ServerState:
        number = before.round + 1
        seen = {**before.last_seen, **dict.fromkeys(self._broadcasts, number)}
        ranks = {**before.ranks, **self._pruned()}
        after = replace(before, round=number, last_seen=seen, last_merge={}, ranks=ranks)
        if total.weight <= 0:
            return after
        spec = self.federation
        step, velocity = _step(
            total.mean(self.fixed is not None),
            before.momentum,
            spec.server_learning_rate,
            spec.server_momentum,
        )
        aggregate = self.rule.finish(step, before, max(spec.ranks), self.options)
        merge = {name: compact(x) for name, x in aggregate.merge.items()}
        merged = add_all([{n: x for n, x in before.base_delta.items() if n in merge}, merge])
        return replace(
            after,
            adapter=aggregate.adapter,
            base_delta={**before.base_delta, **{name: compact(x) for name, x in merged.items()}},
            last_merge=merge,
            momentum=velocity,
            dense={
                name: (_wide(value) + step.factors[_DENSE + name]).to(value.dtype)
                for name, value in before.dense.items()
            },
        )

    def _rank(self, client: int) -> int:
        return self.state.ranks.get(client, self.federation.ranks[client])

    def _pruned(self) -> dict[int, int]:
        """The ranks that clients of this round go on with."""
        return {
            client: max(x.rank for x in update.adapter.values())
            for client, update in self._updates.items()
            if client not in self._rejected and update.adapter
        }

    def _share(self, update: ClientUpdate, total: float) -> float:
        return self.fixed or self.federation.weight(update.num_examples) / total

    def _record(self, before: ServerState, after: ServerState, total: WeightedSum) -> RoundRecord:
        spec = self.federation
        moved = add_all([global_delta(after), scale_all(global_delta(before), -1.0)])
        error = None
        if total.weight > 0 and spec.server_learning_rate == 1.0 and not spec.server_momentum:
            ideal = scale_all(total.ideal, 1.0 if self.fixed is not None else 1.0 / total.weight)
            if (size := total_norm(ideal)) > 0:
                error = total_norm(add_all([moved, scale_all(ideal, -1.0)])) / size
        clients = []
        for client, sent in sorted(self._broadcasts.items()):
            update, rejected = self._updates.get(client), self._rejected.get(client, "")
            counts = update is not None and not rejected and total.weight > 0
            clients.append(
                ClientRecord(
                    client=client,
                    rank=sent.rank,
                    num_examples=update.num_examples if update else spec.num_examples[client],
                    weight=self._share(update, total.weight) if update and counts else 0.0,
                    bytes_down=sent.nbytes,
                    bytes_up=update.nbytes if update else 0,
                    metrics=dict(update.metrics) if update else {},
                    rejected=rejected,
                )
            )
        return RoundRecord(
            round=after.round,
            clients=tuple(clients),
            aggregation_error=error,
            truncation_error=self._truncation_error,
            update_norm=total_norm(moved),
            global_rank=max((x.rank for x in global_delta(after).values()), default=0),
        )

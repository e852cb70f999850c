"""Runs the rounds of the server as a state machine: plan, accept, commit.

    broadcasts = server.plan()                 # {client: Broadcast} of the next round
    server.accept(update)                      # once per client that answers, in any order
    record = server.commit()                   # fold, aggregate, advance

It knows no trainer, no model library and no network, so the same code runs in one process and under
any engine that can carry a message. Updates are folded in client order whatever the order they
arrive in, so that arrival changes no bit. One is folded as soon as all lower clients of the round
have answered, and then let go; what comes earlier waits in memory, or on the disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import InputError
from fedlora.federation.aggregation_error import moved
from fedlora.federation.aggregators.mean import DENSE, WeightedSum, step
from fedlora.federation.exchange import client_start, received
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.federation.participants import Federation
from fedlora.federation.records import ClientRecord, LayerRecord, RoundRecord
from fedlora.federation.spool import Waiting
from fedlora.federation.traffic import bytes_down, initial_factors
from fedlora.lowrank import Adapter, Deltas, add_all, smaller, wide
from fedlora.methods import METHODS
from fedlora.methods.rule import Rule
from fedlora.methods.shared import change
from fedlora.methods.values import Encoded, ServerState
from fedlora.threads import one_thread


def initial_state(
    federation: Federation,
    rule: Rule,
    given: Adapter | None = None,
    dense: Mapping[str, Tensor] | None = None,
) -> ServerState:
    """The state before round 1, from nothing or from an adapter to go on from."""
    fresh = initial_factors(federation.seed, federation.shapes)
    adapter, base_delta = rule.initial(
        federation.shapes, max(federation.ranks), fresh, dict(given or {})
    )
    ranks = dict(enumerate(federation.ranks))
    return ServerState(0, adapter, base_delta, dense=dict(dense or {}), ranks=ranks)


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


@dataclass(frozen=True)
class _Answer:
    """What is remembered of an update when its tensors are gone."""

    num_examples: int
    rank: int | None  # None: it trained no module
    nbytes: int
    metrics: Mapping[str, Any]


class Server:
    """One federation in progress.

    Args:
        federation: who takes part.
        rule: how updates are combined.
        options: the rule's own options.
        state: where it stands; `state` is replaced by `commit`, never changed in place.
        spool: a directory for updates that come before those of lower clients; None: they wait in
            memory. It changes no bit of the result.
    """

    def __init__(
        self,
        federation: Federation,
        rule: Rule,
        options: Any,
        state: ServerState,
        spool: Path | None = None,
    ) -> None:
        check_rule(rule, federation.ranks)
        check_server_step(rule, federation.server_learning_rate, federation.server_momentum)
        self.fixed = rule.fixed_weight(options)
        self.federation = federation
        self.rule = rule
        self.options = options
        self.state = state
        self._waiting = Waiting(spool)
        self._open = False
        self._truncation_error = 0.0
        self._clear()

    def _clear(self) -> None:
        self._broadcasts: dict[int, Broadcast] = {}
        self._answers: dict[int, _Answer] = {}
        self._rejected: dict[int, str] = {}
        self._waiting.clear()
        self._queue: deque[int] = deque()  # the clients not folded yet, ascending
        self._total = WeightedSum()

    @one_thread()
    def plan(self) -> dict[int, Broadcast]:
        """Open the next round: whom it asks, and what each of them is sent.

        Clients of one rank are sent the same tensors, so that memory grows with the number of
        ranks, not with that of clients.
        """
        prepared = self.rule.prepare(self.state, max(self.federation.ranks), self.options)
        self._clear()
        self._open, self._truncation_error = True, prepared.error
        clients = self.federation.sample(self.state.round + 1)
        cuts = {
            rank: self.rule.cut(prepared, rank, self.options)
            for rank in sorted({self._rank(client) for client in clients})
        }
        fresh = initial_factors(self.federation.seed, self.federation.shapes)
        sizes: dict[tuple[int, bool, bool], int] = {}
        for client in clients:
            rank, last = self._rank(client), self.state.last_seen.get(client)
            seen, new = last is not None and last == self.state.round, last is None
            if (rank, seen, new) not in sizes:
                sizes[rank, seen, new] = bytes_down(
                    self.state, cuts[rank], self.rule, fresh, seen=seen, new=new
                )
            self._broadcasts[client] = Broadcast(
                round=self.state.round + 1,
                client=client,
                rank=rank,
                adapter=cuts[rank].adapter,
                leading=cuts[rank].leading,
                base_delta=self.state.base_delta,
                dense=self.state.dense,
                nbytes=sizes[rank, seen, new],
                modules=self.federation.trained_by(client),
            )
        self._queue.extend(clients)
        return dict(self._broadcasts)

    @one_thread()
    def accept(self, update: ClientUpdate) -> str:
        """Take a client's update, and fold those that were waiting for nobody else.

        The update itself is folded with the next one that is taken, or by `commit`: until then
        `reject` can take it back.

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
        if client in self._answers or client in self._rejected:
            raise ValueError(f"client {client} is done with round {update.round} already")
        self._check_shapes(update, sent)
        self._fold_answered()
        ranks = (x.rank for x in update.adapter.values())
        self._answers[client] = _Answer(
            update.num_examples, max(ranks, default=None), update.nbytes, dict(update.metrics)
        )
        bad = [
            name
            for name, x in update.adapter.items()
            if ("A" in update.sends and not torch.isfinite(x.A).all())
            or ("B" in update.sends and not torch.isfinite(x.B).all())
        ]
        bad += [name for name, t in update.dense.items() if not torch.isfinite(t).all()]
        if bad:
            self._rejected[client] = f"its training ended in NaN or Inf ({bad[0]})"
            return self._rejected[client]
        self._waiting.put(update, is_next=client == self._queue[0])
        return ""

    def _check_shapes(self, update: ClientUpdate, sent: Broadcast) -> None:
        client, shapes = update.client, self.federation.shapes
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

    def reject(self, client: int, reason: str) -> None:
        """Note that a client of this round failed; the round goes on without it.

        Raises:
            ValueError: its update was folded already, because another was taken after it.
        """
        held = client in self._waiting
        if client in self._answers and client not in self._rejected and not held:
            raise ValueError(f"client {client} has been counted already; it cannot be taken back")
        self._rejected[client] = reason
        if held:
            self._waiting.take(client)

    def _fold_answered(self) -> None:
        """Fold, in client order, up to the first client that has not answered."""
        while self._queue and (self._queue[0] in self._answers or self._queue[0] in self._rejected):
            self._fold(self._queue.popleft())

    def _fold(self, client: int) -> None:
        if client not in self._answers or client in self._rejected:
            return
        update, before, spec = self._waiting.take(client), self.state, self.federation
        weight = spec.weight(update.num_examples)
        if weight <= 0:
            return
        sent = self._broadcasts[client]
        start = client_start(sent, self.rule, self.options, spec.shapes, spec.seed)
        adapter = received(update, start)
        encoded = self.rule.encode(adapter, start, before, self.options)
        dense = {
            DENSE + name: wide(value) - wide(before.dense[name])
            for name, value in update.dense.items()
        }
        encoded = replace(encoded, factors={**encoded.factors, **dense})
        learnt = None if self.rule.sums_learnt else change(adapter, start.adapter)
        self._total.fold(encoded, learnt, weight if self.fixed is None else self.fixed)

    @one_thread()
    def commit(self) -> RoundRecord:
        """Close the round: fold what is left in client order, aggregate, advance the state.

        With no update that counts, the global model stays as it is.

        Raises:
            ValueError: no round is open.
        """
        if not self._open:
            raise ValueError("commit needs a round that plan has opened")
        while self._queue:
            self._fold(self._queue.popleft())
        before, fixed = self.state, self.fixed is not None
        mean = self._total.mean(fixed) if self._total.weight > 0 else None
        after = self._advance(before, mean)
        wanted = {} if mean is None else self._total.wanted(mean, fixed)
        record = self._record(before, after, wanted)
        self.state, self._open = after, False
        self._clear()
        return record

    def _advance(self, before: ServerState, mean: Encoded | None) -> ServerState:
        number = before.round + 1
        seen = {**before.last_seen, **dict.fromkeys(self._broadcasts, number)}
        ranks = {**before.ranks, **self._pruned()}
        after = replace(before, round=number, last_seen=seen, last_merge={}, ranks=ranks)
        if mean is None:
            return after
        spec = self.federation
        taken, velocity = step(
            mean,
            before.momentum,
            spec.server_learning_rate,
            spec.server_momentum,
        )
        aggregate = self.rule.finish(taken, before, max(spec.ranks), self.options)
        merge = {name: smaller(x) for name, x in aggregate.merge.items()}
        merged = add_all([{n: x for n, x in before.base_delta.items() if n in merge}, merge])
        return replace(
            after,
            adapter=aggregate.adapter,
            base_delta={**before.base_delta, **merged},
            last_merge=merge,
            momentum=velocity,
            dense={
                name: (wide(value) + taken.factors[DENSE + name]).to(value.dtype)
                for name, value in before.dense.items()
            },
        )

    def _rank(self, client: int) -> int:
        return self.state.ranks.get(client, self.federation.ranks[client])

    def _pruned(self) -> dict[int, int]:
        """The ranks that clients of this round go on with."""
        return {
            client: answer.rank
            for client, answer in self._answers.items()
            if client not in self._rejected and answer.rank is not None
        }

    def _share(self, num_examples: int, total: float) -> float:
        return self.fixed or self.federation.weight(num_examples) / total

    def _record(self, before: ServerState, after: ServerState, wanted: Deltas) -> RoundRecord:
        spec, weight = self.federation, self._total.weight
        found, error = moved(before, after, wanted), None
        plain = spec.server_learning_rate == 1.0 and not spec.server_momentum
        if plain and found.wanted > 0:
            error = found.missed / found.wanted
        layers = {
            name: LayerRecord(missed / aimed if plain and aimed > 0 else None, size)
            for name, (size, aimed, missed) in found.modules.items()
        }
        clients = []
        for client, sent in sorted(self._broadcasts.items()):
            answer, rejected = self._answers.get(client), self._rejected.get(client, "")
            counts = answer is not None and not rejected and weight > 0
            clients.append(
                ClientRecord(
                    client=client,
                    rank=sent.rank,
                    num_examples=answer.num_examples if answer else spec.num_examples[client],
                    weight=self._share(answer.num_examples, weight) if answer and counts else 0.0,
                    bytes_down=sent.nbytes,
                    bytes_up=answer.nbytes if answer else 0,
                    metrics=answer.metrics if answer else {},
                    rejected=rejected,
                )
            )
        return RoundRecord(
            round=after.round,
            clients=tuple(clients),
            aggregation_error=error,
            truncation_error=self._truncation_error,
            update_norm=found.size,
            global_rank=_global_rank(after),
            layers=layers,
        )


def _global_rank(state: ServerState) -> int:
    """The largest rank bound of a module of `base_delta + adapter`, which is never formed."""
    bounds: dict[str, int] = {}
    for deltas in (state.base_delta, state.adapter):
        for name, x in deltas.items():
            bounds[name] = min(bounds.get(name, 0) + x.rank, *x.shape)
    return max(bounds.values(), default=0)

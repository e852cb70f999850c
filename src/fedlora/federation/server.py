"""Runs the rounds of the server as a state machine: plan, accept, commit.

    broadcasts = server.plan()                 # {client: Broadcast} of the next round
    server.accept(update)                      # once per client that answers, in any order
    record = server.commit()                   # fold, aggregate, advance

It knows no trainer, no model library and no network, so the same code runs in one process and under
any engine that can carry a message. An update takes this way:

    accept -> wait for lower clients -> encode, shift -> aggregator.fold
    commit -> aggregator.result -> server step -> the rule's finalize -> the next state

Updates are folded in client order whatever the order they arrive in, so that arrival changes no
bit. One is folded as soon as all lower clients of the round have answered, and then let go; what
comes earlier waits in memory, or on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

from torch import Tensor

from fedlora.federation.aggregators import Aggregator
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.checks import check_rule, check_server_step, check_shapes, not_finite
from fedlora.federation.codec import as_new
from fedlora.federation.exchange import client_start, encode_update, server_view
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.federation.participants import Federation
from fedlora.federation.recording import Answer, answer_of, client_records, round_record
from fedlora.federation.records import RoundRecord
from fedlora.federation.server_step import step
from fedlora.federation.spool import ReorderBuffer
from fedlora.federation.traffic import bytes_down
from fedlora.lowrank import Adapter, Delta, Deltas, Dense, LowRank, add_all, cheaper_form, wide
from fedlora.methods.shared import change, with_shift
from fedlora.methods.values import DENSE, Aggregate, Encoded, Prepared, RoundNumbers, ServerState
from fedlora.threads import one_thread


def initial_state(
    federation: Federation,
    given: Adapter | None = None,
    dense: Mapping[str, Tensor] | None = None,
) -> ServerState:
    """The state before round 1.

    Args:
        federation: who takes part.
        given: an adapter to go on from.
        dense: the parameters that are trained whole, by name.
    """
    agreement = federation.agreement
    adapter, base_delta = agreement.rule.initial(
        agreement.shapes, max(federation.ranks), agreement.shared_factors, dict(given or {})
    )
    ranks = dict(enumerate(federation.ranks))
    return ServerState(0, adapter, base_delta, dense=dict(dense or {}), ranks=ranks)


class Server:
    """One federation in progress.

    Args:
        federation: who takes part, by which agreement.
        state: where it stands; `state` is replaced by `commit`, never changed in place.
        aggregator: what the clients' updates are folded into.
        spool: a directory for updates that come before those of lower clients; None: they wait in
            memory. It changes no bit of the result.

    Raises:
        InputError: the rule cannot combine the ranks, or take the server's step.
    """

    def __init__(
        self,
        federation: Federation,
        state: ServerState,
        aggregator: Aggregator,
        spool: Path | None = None,
    ) -> None:
        rule = federation.agreement.rule
        check_rule(rule, federation.ranks)
        check_server_step(rule, federation.server_learning_rate, federation.server_momentum)
        self.federation = federation
        self.agreement = federation.agreement
        self.state = state
        self.aggregator = aggregator
        self._buffer = ReorderBuffer(spool)
        self._close()

    def _close(self) -> None:
        """No round is open; of the one before nothing is left."""
        self._open = False
        self._truncation_error = 0.0
        self._broadcasts: dict[int, Broadcast] = {}
        self._answers: dict[int, Answer] = {}
        self._rejected: dict[int, str] = {}
        self._buffer.open()
        self.aggregator.begin()
        # What was learnt, to measure the aggregation error against; None where the aggregator's own
        # result says it.
        known = self.agreement.rule.sums_learnt and self.aggregator.is_mean
        self._learnt = None if known else Mean()

    @one_thread()
    def plan(self) -> dict[int, Broadcast]:
        """Open the next round: whom it asks, and what each of them is sent.

        Clients of one rank are sent the same tensors, so that memory grows with the number of
        ranks, not with that of clients.
        """
        state, federation, agreement = self.state, self.federation, self.agreement
        rule, options, largest = agreement.rule, agreement.options, max(federation.ranks)
        prepared = _laid_out(rule.broadcast(state, largest, options))
        base_delta = _as_new(state.base_delta)
        numbers = RoundNumbers(dict.fromkeys(agreement.shapes, largest), state.levels)
        fresh = agreement.shared_factors

        @cache
        def sent_to(rank: int) -> Prepared:
            return _laid_out(rule.for_rank(prepared, rank, options))

        @cache
        def bytes_to(rank: int, seen: bool, new: bool) -> int:
            return bytes_down(state, sent_to(rank), rule, fresh, seen=seen, new=new)

        self._close()
        self._open, self._truncation_error = True, prepared.error
        for client in federation.sample(state.round + 1):
            rank, last = self._rank(client), state.last_seen.get(client)
            self._broadcasts[client] = Broadcast(
                round=state.round + 1,
                client=client,
                rank=rank,
                adapter=sent_to(rank).adapter,
                leading=sent_to(rank).leading,
                base_delta=base_delta,
                dense=state.dense,
                nbytes=bytes_to(rank, last == state.round, last is None),
                numbers=numbers,
                modules=federation.trained_by(client),
            )
        self._buffer.open(self._broadcasts)
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
        check_shapes(update, sent, self.agreement)
        for earlier in self._buffer.ready():
            self._fold(earlier)
        self._answers[client] = answer_of(update)
        if where := not_finite(update):
            self._rejected[client] = f"its training ended in NaN or Inf ({where})"
            self._buffer.skip(client)
            return self._rejected[client]
        self._buffer.put(update)
        return ""

    def reject(self, client: int, reason: str) -> None:
        """Note that a client of this round failed; the round goes on without it.

        Raises:
            ValueError: its update was folded already, because another was taken after it.
        """
        counted = client in self._answers and client not in self._rejected
        if counted and client not in self._buffer:
            raise ValueError(f"client {client} has been counted already; it cannot be taken back")
        self._rejected[client] = reason
        self._buffer.skip(client)

    def _fold(self, update: ClientUpdate) -> None:
        """Encode an update whose turn has come, and let the aggregator take it in."""
        weight = self.federation.weight(update.num_examples)
        if weight <= 0:
            return
        agreement, sent = self.agreement, self._broadcasts[update.client]
        if agreement.fixed_weight is not None:
            weight = agreement.fixed_weight
        start = client_start(sent, agreement)
        encoded = encode_update(update, start, sent, agreement)
        # The shift is linear, and could be added to the sum. Added here it is part of what an
        # aggregator other than the mean compares the clients by.
        shifted = with_shift(agreement.rule, encoded, self.state, agreement.options)
        self.aggregator.fold(shifted, weight)
        if self._learnt is not None:
            learnt = change(server_view(update, start), start.adapter)
            self._learnt.fold(Encoded(products=learnt), weight)

    @one_thread()
    def commit(self) -> RoundRecord:
        """Close the round: fold what is left in client order, aggregate, advance the state.

        With no update that counts, the global model stays as it is.

        Raises:
            ValueError: no round is open.
        """
        if not self._open:
            raise ValueError("commit needs a round that plan has opened")
        for update in self._buffer.rest():
            self._fold(update)
        before, weight = self.state, self.aggregator.weight
        normalised = self.agreement.fixed_weight is None
        after = self._without_updates(before)
        wanted: Deltas = {}
        if weight > 0:
            total = self.aggregator.result(normalised)
            after = self._advance(before, after, total)
            wanted = total.products
            if self._learnt is not None:
                wanted = self._learnt.result(normalised).products
        clients = client_records(
            self.federation, self._broadcasts, self._answers, self._rejected, weight
        )
        record = round_record(
            self.federation, before, after, wanted, clients, self._truncation_error
        )
        self.state = after
        self._close()
        return record

    def _without_updates(self, before: ServerState) -> ServerState:
        """The next state where no update counts: a round later, and the same model."""
        number = before.round + 1
        seen = {**before.last_seen, **dict.fromkeys(self._broadcasts, number)}
        ranks = {**before.ranks, **self._pruned()}
        return replace(before, round=number, last_seen=seen, last_merge={}, ranks=ranks)

    def _advance(self, before: ServerState, after: ServerState, total: Encoded) -> ServerState:
        """The next state by what the clients' updates came to."""
        federation, agreement = self.federation, self.agreement
        applied, velocity = step(
            total, before.momentum, federation.server_learning_rate, federation.server_momentum
        )
        aggregate = agreement.rule.finalize(
            applied, before, max(federation.ranks), agreement.options
        )
        base_delta, merge = _merge(before.base_delta, aggregate)
        return replace(
            after,
            adapter=aggregate.adapter,
            leading=aggregate.leading,
            increments={after.round: aggregate.increments} if aggregate.increments else {},
            base_delta=base_delta,
            last_merge=merge,
            momentum=velocity,
            dense={
                name: (wide(value) + applied.factors[DENSE + name]).to(value.dtype)
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


def _laid_out(sent: Prepared) -> Prepared:
    """What clients are sent, laid out as if it had gone through a message: see `as_new`.

    A start depends in its last bits on how tensors lie in memory. The server computes it from what
    it has and a client from a copy, and both must find the same.
    """
    adapter = _as_new(sent.adapter)
    own = _as_new({n: x for n, x in sent.leading.items() if x is not sent.adapter.get(n)})
    leading = {name: own.get(name, adapter.get(name)) for name in sent.leading}
    return Prepared(adapter, cast(Adapter, leading), sent.error)


def _as_new(deltas: Deltas) -> Deltas:
    """These updates with every tensor as new; they themselves where all are."""

    def module(x: Delta) -> Delta:
        if isinstance(x, Dense):
            return x if (w := as_new(x.W)) is x.W else Dense(w)
        a, b = as_new(x.A), as_new(x.B)
        return x if a is x.A and b is x.B else LowRank(a, b)

    out = {name: module(x) for name, x in deltas.items()}
    return deltas if all(out[name] is x for name, x in deltas.items()) else out


def _merge(base_delta: Deltas, aggregate: Aggregate) -> tuple[Deltas, Deltas]:
    """The frozen side after a round, and what the round has added to it."""
    merge = {name: cheaper_form(x) for name, x in aggregate.merge.items()}
    touched = {name: x for name, x in base_delta.items() if name in merge}
    return {**base_delta, **add_all([touched, merge])}, merge

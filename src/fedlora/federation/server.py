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

from torch import Tensor

from fedlora.federation.aggregators import Aggregator
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.checks import check_rule, check_server_step, check_shapes, not_finite
from fedlora.federation.downlink import as_it_arrives, handed_out
from fedlora.federation.exchange import client_start, encode_update, server_view
from fedlora.federation.increments import (
    Sketch,
    agree,
    laid_out,
    laid_out_to_send,
    merged,
    sketch,
    worth_keeping,
)
from fedlora.federation.messages import Broadcast, ClientUpdate, Lacking
from fedlora.federation.participants import Federation
from fedlora.federation.recording import (
    Answer,
    Rejection,
    answer_of,
    client_records,
    round_record,
)
from fedlora.federation.records import Outcome, RoundRecord
from fedlora.federation.server_step import step
from fedlora.federation.spool import ReorderBuffer
from fedlora.federation.traffic import lacking, model_lacking
from fedlora.lowrank import Adapter, Deltas, wide
from fedlora.methods.shared import change, with_shift
from fedlora.methods.tracking import unchanged
from fedlora.methods.values import DENSE, Change, Encoded, Prepared, RoundNumbers, ServerState
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
        # Clients compute from copies; what they compute with must lie in memory alike.
        adapter = laid_out(state.adapter) if self.agreement.followed else state.adapter
        self.state = replace(state, adapter=adapter, base_delta=laid_out(state.base_delta))
        self.aggregator = aggregator
        self._buffer = ReorderBuffer(spool)
        self._close()

    def _close(self) -> None:
        """No round is open; of the one before nothing is left."""
        self._open = False
        self._truncation_error, self._rounding_error = 0.0, 0.0
        self._prepared: Prepared | None = None
        self._sketch: Sketch | None = None
        self._unreached: set[int] = set()
        self._broadcasts: dict[int, Broadcast] = {}
        self._answers: dict[int, Answer] = {}
        self._rejected: dict[int, Rejection] = {}
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
        self._close()
        state, federation, agreement = self.state, self.federation, self.agreement
        rule, options, largest = agreement.rule, agreement.options, max(federation.ranks)
        self._prepared = prepared = laid_out_to_send(rule.broadcast(state, largest, options))
        base_delta = laid_out(state.base_delta)
        numbers = RoundNumbers(dict.fromkeys(agreement.shapes, largest), state.levels)

        @cache
        def sent_to(rank: int) -> Prepared:
            return laid_out_to_send(self._rounded(rule.for_rank(prepared, rank, options)))

        @cache
        def bytes_to(rank: int, held: int | None) -> int:
            return self._lacking(sent_to(rank), held).nbytes

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
                nbytes=bytes_to(rank, None if last is None else last - 1),
                numbers=numbers,
                modules=federation.trained_by(client),
            )
        self._buffer.open(self._broadcasts)
        return dict(self._broadcasts)

    def _rounded(self, sent: Prepared) -> Prepared:
        """What clients of a rank are sent, as it arrives; its error is noted."""
        sent, error = as_it_arrives(sent, self.agreement, self.state.round + 1)
        self._rounding_error = max(self._rounding_error, error)
        return sent

    def lacking(self, client: int, held: int | None) -> Lacking:
        """What a client of this round has to be sent, for its site to have the broadcast.

        The client's record counts these bytes instead of those that `plan` expected.

        Args:
            client: one that `plan` asks.
            held: the round whose global model it has confirmed; None where it holds none, or not
                the right one (`has_drifted`).
        """
        sent = self._broadcasts[client]
        lacking = self._lacking(Prepared(sent.adapter, sent.leading), held)
        self._broadcasts[client] = replace(sent, nbytes=lacking.nbytes)
        return lacking

    def _lacking(self, sent: Prepared, held: int | None) -> Lacking:
        agreement = self.agreement
        assert self._prepared is not None, "plan has opened the round"
        return lacking(
            self.state,
            self._prepared,
            sent,
            agreement.rule,
            agreement.options,
            agreement.shared_factors,
            held,
            agreement.compression,
        )

    def model_lacking(self, held: int | None) -> Lacking:
        """What a site lacks of the present global model, to evaluate it between two rounds.

        Args:
            held: the round whose global model it has confirmed; None where it holds none. Having
                been sent this, it holds that of `state.round`.
        """
        agreement, state = self.agreement, self.state
        largest = max(self.federation.ranks)
        prepared = laid_out_to_send(agreement.rule.broadcast(state, largest, agreement.options))
        if not agreement.followed:
            meant = Prepared(state.adapter, {})
            state = replace(state, adapter=self._rounded(meant).adapter)
        return model_lacking(state, prepared, agreement.followed, held, agreement.compression)

    def has_drifted(self, confirmation: Sketch) -> bool:
        """Whether a client's global model is not that of this round, but for rounding.

        Args:
            confirmation: of the client's model (`HeldModel.confirmation`).
        """
        if self._sketch is None:
            kept = (self.state.adapter,) if self.agreement.followed else ()
            self._sketch = sketch(self.state.base_delta, *kept)
        return not agree(confirmation, self._sketch)

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
        self._answers[client] = answer_of(update, self.agreement.compression)
        if where := not_finite(update):
            reason = f"its training ended in NaN or Inf ({where})"
            self._rejected[client] = Rejection(reason)
            self._buffer.skip(client)
            return reason
        self._buffer.put(update)
        return ""

    def reject(
        self, client: int, reason: str, outcome: Outcome = "failed", *, reached: bool = True
    ) -> None:
        """Note that a client of this round does not count; the round goes on without it.

        Args:
            client: its number.
            reason: why, in words.
            outcome: what became of it.
            reached: whether it has received what it was sent, and holds it.

        Raises:
            ValueError: its update was folded already, because another was taken after it.
        """
        counted = client in self._answers and client not in self._rejected
        if counted and client not in self._buffer:
            raise ValueError(f"client {client} has been counted already; it cannot be taken back")
        self._rejected[client] = Rejection(reason, outcome)
        if not reached:
            self._unreached.add(client)
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

    def traffic(self) -> tuple[int, int]:
        """Bytes that clients have sent, and were sent, since `plan` opened the round."""
        down = sum(sent.nbytes for sent in self._broadcasts.values())
        return sum(answer.nbytes for answer in self._answers.values()), down

    def unconfirmed(self, client: int) -> None:
        """Note that a client of this round has not confirmed its global model.

        What has changed since the model that it confirmed last is kept for it.
        """
        self._unreached.add(client)

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
        errors = self._truncation_error, self._rounding_error
        record = round_record(self.federation, before, after, wanted, clients, *errors)
        self.state = replace(after, changes=worth_keeping(after, self.agreement.compression))
        self._close()
        return record

    def _without_updates(self, before: ServerState) -> ServerState:
        """The next state where no update counts: a round later, and the same model."""
        number = before.round + 1
        reached = [client for client in self._broadcasts if client not in self._unreached]
        seen = {**before.last_seen, **dict.fromkeys(reached, number)}
        ranks = {**before.ranks, **self._pruned()}
        still = {name: unchanged(x) for name, x in before.leading.items()}
        return replace(
            before,
            round=number,
            last_seen=seen,
            last_merge={},
            ranks=ranks,
            changes={**before.changes, number: Change({}, still)},
        )

    def _advance(self, before: ServerState, after: ServerState, total: Encoded) -> ServerState:
        """The next state by what the clients' updates came to."""
        federation = self.federation
        applied, velocity = step(
            total, before.momentum, federation.server_learning_rate, federation.server_momentum
        )
        handed = handed_out(applied, before, federation)
        self._rounding_error = max(self._rounding_error, handed.error)
        aggregate, merge = handed.aggregate, handed.aggregate.merge
        return replace(
            after,
            unsent=handed.unsent,
            adapter=aggregate.adapter,
            leading=aggregate.leading,
            changes={**before.changes, after.round: Change(merge, aggregate.increments)},
            base_delta=merged(before.base_delta, merge),
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

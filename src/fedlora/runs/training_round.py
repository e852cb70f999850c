"""Has the clients of a round trained: asks them, takes what comes, tries again below quorum."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.federation.messages import Broadcast
from fedlora.federation.records import Outcome
from fedlora.federation.server import Server
from fedlora.lowrank import Deltas
from fedlora.runs.engine import ClientResult, Engine, EngineState, Failure
from fedlora.runs.events import ClientEnd, Notice, Report, RoundBegin, Scores
from fedlora.runs.round_clock import RoundClock
from fedlora.runs.run_session import RunSession
from fedlora.seeds import SERVER, Purpose, generator

Models = dict[int, tuple[Deltas, Mapping[str, Tensor]]]
"""Client number -> the model it ended a round with: what is added to the base, what is trained
whole."""

FULL = "the round was full"
"""Why a client does not count that was asked beyond what the round needs."""


class TrainingRound:
    """One round from its plan to the moment where all updates that count are folded.

    It ends when `clients_needed_per_round` updates count, when every client has answered, or at
    `round_timeout`, whatever comes first. Where fewer than `min_clients_per_round` count then, it
    is tried again.

    Args:
        session: of the run.
        server: plans the round and takes the updates; committing it is the caller's.
        engine: carries the messages.
        report: told `round_begin`, `client_end` and warnings.
        clock: of the round.
        due: whether this round is evaluated.
        personal: whether every client has a model of its own and there is no global one.

    Attributes:
        attempts: how often it was tried.
        given_up: bytes up and down of the attempts that were given up.
        models: the models that clients ended with, where they are kept.
        scores: what these measure, where they are evaluated.
    """

    def __init__(
        self,
        session: RunSession,
        server: Server,
        engine: Engine,
        report: Report,
        clock: RoundClock,
        *,
        due: bool,
        personal: bool,
    ) -> None:
        self.config, self.server, self.engine = session.config, server, engine
        self.report, self.clock = report, clock
        self.evaluates = self.config.eval_personal and due and not personal
        self.keeps_models = self.config.save_client_models and not personal
        self.number = server.state.round + 1
        self.attempts, self.given_up = 0, (0, 0)
        self.models: Models = {}
        self.scores: dict[int, Scores] = {}

    def run(self, take_in_changes: Callable[[], None] = lambda: None) -> None:
        """Have the clients trained, again where fewer than `min_clients_per_round` count.

        An attempt that is given up leaves no trace: neither at the server, which has committed
        nothing, nor in what clients keep for themselves.

        Args:
            take_in_changes: called before every attempt, so that the server asks who has joined,
                and nobody who has left.

        Raises:
            FedloraError: there were too few in every attempt; the run can be resumed.
        """
        least, before = self.config.min_clients_per_round or 0, self.engine.state()
        while self.attempts < self.config.round_attempts:
            self.attempts += 1
            take_in_changes()
            broadcasts = self.server.plan()
            self.models, self.scores = {}, {}
            self.clock.now("train")
            self.report(
                RoundBegin(
                    event="round_begin",
                    round=self.number,
                    clients=list(broadcasts),
                    attempt=self.attempts,
                )
            )
            counted = self._exchange(broadcasts)
            if counted >= least:
                return
            up, down = self.server.traffic()
            self.given_up = self.given_up[0] + up, self.given_up[1] + down
            self.engine.restore(EngineState(self.engine.state().facts, before.clients))
            if self.attempts < self.config.round_attempts:
                self._warn(
                    f"{counted} of {len(broadcasts)} clients count in round {self.number}, fewer "
                    f"than min_clients_per_round {least}; it is tried again"
                )
            self.clock.now("aggregate")
        raise FedloraError(
            f"round {self.number}: {counted} of {len(broadcasts)} clients count, fewer than "
            f"min_clients_per_round {least}, in {self.attempts} attempts; nothing of it is kept. "
            "See above why they are left out; then go on with: fedlora run --resume "
            f"{self.config.output_dir}"
        )

    def _exchange(self, broadcasts: Mapping[int, Broadcast]) -> int:
        """Have the clients trained once, and their updates folded as they come.

        Returns:
            How many count.
        """
        missing, timeout, counted = set(broadcasts), self.config.round_timeout, 0
        needed = self.config.clients_needed_per_round
        deadline = None if timeout is None else time.monotonic() + timeout
        with closing(self.engine.exchange(self._in_order(broadcasts), deadline)) as outcomes:
            for outcome in outcomes:
                if outcome.client not in missing:
                    self._warn(
                        f"an answer of client {outcome.client} that nobody waits for is ignored"
                    )
                    continue
                missing.discard(outcome.client)
                counted += self._take(outcome)
                if counted == needed:
                    break
        for client in sorted(missing):
            if counted == needed:
                self.server.reject(client, FULL, "unneeded")
                self._tell_end(client, FULL, "unneeded")
            else:
                self._leave_out(Failure(client, "it did not answer"))
        return counted

    def _in_order(self, broadcasts: Mapping[int, Broadcast]) -> list[Broadcast]:
        """The broadcasts in the order in which the engine is to begin with them.

        Where a round asks more clients than it needs, the first to answer count. An engine that
        trains one client after the other would leave out those of the highest numbers in every
        round; so the order is drawn.
        """
        clients = sorted(broadcasts)
        needed = self.config.clients_needed_per_round
        if needed is not None and needed < len(clients):
            draw = generator(self.config.seed, self.number, SERVER, Purpose.ORDER)
            clients = draw.permutation(clients).tolist()
        return [broadcasts[client] for client in clients]

    def _take(self, outcome: ClientResult | Failure) -> bool:
        """Let the server take what became of a client; whether its update counts."""
        if isinstance(outcome, Failure):
            self._leave_out(outcome)
            return False
        try:
            with self.clock.meanwhile("aggregate"):
                problem = self.server.accept(outcome.update)
        except ValueError as error:  # not what it was asked for: its own fault, not the round's
            self._leave_out(Failure(outcome.client, str(error)))
            return False
        if problem:
            self._warn_of(outcome.client, problem)
        self._tell_end(
            outcome.client, problem, "failed" if problem else "counted", outcome.update.metrics
        )
        # A rule with personal models evaluates and keeps them by itself.
        if not problem and (self.evaluates or self.keeps_models):
            with self.clock.meanwhile("evaluate"):
                self._look_at_model(outcome)
        return not problem

    def _look_at_model(self, result: ClientResult) -> None:
        """Keep and evaluate the model a client ended with, where that is asked for."""
        model, update = result.model(), result.update
        if self.keeps_models:
            self.models[update.client] = model, update.dense
        if self.evaluates and (
            scores := self.engine.evaluate_client(update.client, model, update.dense)
        ):
            self.scores[update.client] = scores

    def _leave_out(self, failure: Failure) -> None:
        """Go on without a client that was to count."""
        outcome: Outcome = "late" if failure.late else "failed"
        self.server.reject(failure.client, failure.reason, outcome)
        self._warn_of(failure.client, failure.reason)
        self._tell_end(failure.client, failure.reason, outcome)

    # --- telling ---

    def _tell_end(
        self, client: int, problem: str, outcome: Outcome, metrics: Mapping[str, Any] | None = None
    ) -> None:
        self.report(
            ClientEnd(
                event="client_end",
                client=client,
                metrics=metrics or {},
                rejected=problem,
                outcome=outcome,
            )
        )

    def _warn_of(self, client: int, problem: str) -> None:
        self._warn(f"client {client} is left out of round {self.number}: {problem}")

    def _warn(self, message: str) -> None:
        self.report(Notice(event="warning", message=message))

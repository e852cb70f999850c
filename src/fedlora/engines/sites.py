"""Trains the clients where their rows are: at sites whose workers are other processes.

The server has neither their rows nor, with `server_evaluation: false`, any weight of the base. It
speaks to every site in messages (`federation.site_wire`, `federation.handshake`) that a
`Transport` carries, and takes the answers as they come. A site is sent what it lacks of the global
model. One that is late, refuses, or fails however often it is asked is left out of the round; one
that has died goes on from what it keeps on its disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from torch import Tensor

from fedlora.client.trainer import name_of_trainer, train, training_of
from fedlora.config.config import Config
from fedlora.engines.at_once import LATE, at_once
from fedlora.engines.carrier import SiteError
from fedlora.engines.known_site import Site, with_all_where_lost
from fedlora.engines.late_joining import LateJoining
from fedlora.engines.results import asked_modules, result_of
from fedlora.engines.roster import Member
from fedlora.engines.site_calls import LeftError
from fedlora.engines.site_handshake import Opened
from fedlora.engines.site_progress import StepWatch
from fedlora.errors import InputError
from fedlora.federation.envelope import Header, Message, RefusedMessageError, encode
from fedlora.federation.handshake import (
    Evaluated,
    Leave,
    leave_message,
    read_evaluated,
    with_counted,
)
from fedlora.federation.increments import Sketch
from fedlora.federation.messages import Broadcast, ClientUpdate, Lacking
from fedlora.federation.server import Server
from fedlora.federation.site_wire import model_message, read_confirmation, site_message
from fedlora.federation.wire import TRAINED, read_trained
from fedlora.lowrank import Deltas
from fedlora.methods.values import ServerState
from fedlora.runs import engine as seam
from fedlora.runs.course import has_personal_models
from fedlora.runs.engine import ClientResult, EngineState, Exchange, Failure
from fedlora.runs.evaluation import Evaluator
from fedlora.runs.events import ClientBegin, Evaluations, Notice, Report
from fedlora.runs.site_evaluation import mean_by_rows

_DRIFTED = "its global model is not the server's any more; it is sent all of it next time"
_LASTING = ("base", "data", "num_examples", "rank", "label_names", "shapes", "full_params")
_GOODBYE = 10.0  # seconds

_Trained = tuple[ClientUpdate, Sketch | None]  # with what the site holds


class SitesEngine:
    """An engine (`fedlora.runs.engine.Engine`) whose clients are sites.

    Args:
        opened: the federation, whose sites have joined.
        report: told `client_begin` events and warnings.
        notices: what calls to sites tell from their threads.
    """

    def __init__(self, opened: Opened, report: Report, notices: SimpleQueue[str]) -> None:
        self.session, self.report = opened.session, report
        self.handshake, self.calls = opened.handshake, opened.handshake.calls
        self.sites = {
            told.client: Site(told, holds=told.confirmed or None) for told in opened.joined.values()
        }
        self.num_clients = len(opened.session.federation.ranks)
        self.late = LateJoining(opened.handshake, opened.session, opened.waiting, self._warn)
        self.personal = has_personal_models(opened.session)
        self.evaluator = Evaluator(opened.session, {}, self.personal)
        self._notices = notices
        self._leaving: dict[str, Member] = dict(opened.left)
        self._round, self._attempt, self._committed = 0, 0, 0
        self._bytes_to_evaluate = list[int]()
        self._lacking = threading.Lock()  # several threads ask the server what their site lacks

    @property
    def identity(self) -> Mapping[str, str]:
        """The base's fingerprint; rows and local training are the sites' own (see `restore`).

        Clients of a simulation train as the configuration says.
        """
        base, training = self.session.sites[0].base, _name_of_training(self.session.config)
        return {"base": base, "data": seam.ELSEWHERE, "train_function": training}

    def serve(self, server: Server) -> None:
        """Say whose rounds are carried: the server knows what a site lacks of the global model."""
        self.server = server

    # --- who takes part ---

    def changes(self) -> Sequence[seam.Joined | seam.Left]:
        """The sites that have left since this was asked last, and those that have joined."""
        changes: list[seam.Joined | seam.Left] = [
            seam.Left(member.client, name, member.left or "")
            for name, member in self._leaving.items()
        ]
        self._leaving.clear()
        for told in self.late.joined(self.num_clients, self._committed):
            self.sites[told.client] = Site(told)
            self.num_clients += 1
            changes.append(
                seam.Joined(
                    client=told.client,
                    name=told.site,
                    rank=told.rank,
                    rows=told.num_examples,
                    eval_rows=told.eval_rows,
                    tokens=told.tokens,
                )
            )
        self._pass_on()
        return changes

    def _has_left(self, site: Site, error: LeftError) -> None:
        client, rank = site.joined.client, site.joined.rank
        if self.sites.pop(client, None) is not None:
            self._leaving[site.name] = Member(client, rank, error.reason)

    # --- a round ---

    def exchange(self, broadcasts: Sequence[Broadcast], deadline: float | None = None) -> Exchange:
        """Send every site at a time what it lacks, and bring the updates as they come.

        When the round is full, sites that still train are told to stop; what they answer is
        dropped.
        """
        if not broadcasts:
            return
        self._begin_round(broadcasts[0].round)
        sent = {broadcast.client: broadcast for broadcast in broadcasts}
        for client in sent.keys() - self.sites.keys():
            yield Failure(client, "its site has left")
        asks, training = {}, {}
        for client in sorted(sent.keys() & self.sites.keys()):
            site, broadcast = self.sites[client], sent[client]
            self.report(ClientBegin(event="client_begin", client=client, rank=broadcast.rank))
            asks[client] = partial(self._train, site, broadcast, self._attempt, deadline)
            training[site.name] = client
        with StepWatch(self.calls.transport.status, training, self._round) as watch:

            def meanwhile() -> None:
                self._pass_on()
                for step in watch.steps():
                    self.report(step)

            try:
                for client, outcome in at_once(asks, deadline, meanwhile):
                    del asks[client]
                    yield self._outcome(sent[client], outcome)
            except GeneratorExit:
                for client in asks:
                    self.server.unconfirmed(client)
                missing = [self.sites[client].name for client in asks if client in self.sites]
                self.calls.transport.cancel(missing)
                raise

    def _begin_round(self, number: int) -> None:
        """Note a round's next attempt; what sites trained in one that was given up is lost."""
        self._attempt = self._attempt + 1 if number == self._round else 0
        for site in self.sites.values():
            if site.trained is not None and number != self._round:
                site.counted = site.trained
            site.trained = None
        self._round, self._committed = number, number - 1

    def _train(
        self, site: Site, broadcast: Broadcast, attempt: int, deadline: float | None
    ) -> _Trained:
        """Have a site train; called in a thread of its own."""
        client, agreement = broadcast.client, self.session.federation.agreement
        modules = {client: asked_modules(broadcast, agreement.shapes)}

        def read(answer: Message) -> _Trained:
            if answer.header.kind != TRAINED:
                raise RefusedMessageError(f"it is {answer.header.kind[:40]}, not an update")
            updates, states = read_trained(answer, modules)
            if [update.client for update in updates] != [client] or states:
                raise RefusedMessageError("it is not one update of this client alone")
            return updates[0], read_confirmation(answer)

        def ask(held: int | None) -> _Trained:
            with self._lacking:
                if self._round != broadcast.round:
                    raise SiteError("deadline", LATE)
                lacking = self.server.lacking(client, held)
            header = self._header(broadcast.round, attempt)
            message = with_counted(site_message(header, broadcast, lacking), site.counted)
            recover = partial(self._come_back, site, broadcast.round - 1)
            return self.calls.ask(site.name, message, read, deadline, recover)

        return with_all_where_lost(ask, site.holds)

    def _come_back(self, site: Site, committed: int) -> None:
        """Have a site join again whose worker was gone, and see whether it is the same.

        Raises:
            SiteError: it is not.
        """
        before = site.joined
        member = Member(before.client, before.rank)
        joined = self.handshake.join(site.name, member, self.num_clients, committed)
        if any(getattr(joined, what) != getattr(before, what) for what in _LASTING):
            raise SiteError(
                "mistake",
                "it came back with another base, rank or rows; give it back what it had, or start "
                "a new run",
            )
        agreement = self.session.federation.agreement
        self.handshake.agree(joined, agreement, self.num_clients, committed)

    def _outcome(
        self, broadcast: Broadcast, outcome: _Trained | SiteError | LeftError
    ) -> ClientResult | Failure:
        client = broadcast.client
        if isinstance(outcome, tuple):
            update, confirmation = outcome
            drifted = confirmation is None or self.server.has_drifted(confirmation)
            if client in self.sites:
                site = self.sites[client]
                site.trained = broadcast.round, self._attempt
                site.holds = None if drifted else broadcast.round - 1
            if drifted:
                return Failure(client, _DRIFTED)
            return result_of(broadcast, update, self.session.federation.agreement)
        self.server.unconfirmed(client)
        if isinstance(outcome, LeftError):
            if client in self.sites:
                self._has_left(self.sites[client], outcome)
            return Failure(client, f"its site leaves the run: {outcome.reason}")
        late = outcome.kind == "deadline"
        return Failure(client, LATE if late else outcome.reason, late=late)

    def _header(self, number: int, attempt: int) -> Header:
        agreement = self.session.federation.agreement
        base = self.session.sites[0].base
        return Header(self.handshake.run, number, attempt, "", base, agreement.digest)

    # --- evaluation ---

    @property
    def can_evaluate(self) -> bool:
        """Whether the server or any site has rows to evaluate on."""
        here = self.session.evaluates and not self.personal
        return here or any(site.joined.eval_rows for site in self.sites.values())

    def evaluate(self, state: ServerState) -> Evaluations:
        """Evaluate the global model at the sites, and at the server where it has rows.

        Returns:
            `client_evaluations` of the sites; `evaluation` on the server's rows or else on those of
            all sites together (`mean_by_rows`); `general_evaluation` of the server. Under a rule
            with personal models each site has evaluated its own, and the server none.
        """
        self._committed = state.round
        out = Evaluations()
        if self.session.evaluates and not self.personal:
            out = self.evaluator.of_server(state)
        evaluated = self._evaluated(state)
        if evaluated:
            out["client_evaluations"] = {str(k): x.metrics for k, x in evaluated.items()}
            out["evaluation_bytes_down"] = sum(self._bytes_to_evaluate)
            out.setdefault("evaluation", mean_by_rows(evaluated))
        return out

    def _evaluated(self, state: ServerState) -> dict[int, Evaluated]:
        """What the sites have measured of the global model, by client."""
        asked = {k: site for k, site in self.sites.items() if site.joined.eval_rows}
        timeout = self.session.config.round_timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        self._bytes_to_evaluate = list[int]()
        rounds_held = {site.holds for site in asked.values()}
        lacking = {held: self.server.model_lacking(held) for held in rounds_held}
        asks = {
            client: partial(self._measure, site, state, lacking, deadline)
            for client, site in asked.items()
        }
        evaluated = dict[int, Evaluated]()
        for client, outcome in at_once(asks, deadline, self._pass_on):
            site = asked[client]
            if isinstance(outcome, Evaluated):
                evaluated[client], site.holds = outcome, state.round
                continue
            self._warn(f"site {site.name} does not evaluate: {outcome.reason}")
            if isinstance(outcome, LeftError):
                self._has_left(site, outcome)
        return {client: evaluated[client] for client in sorted(evaluated) if evaluated[client].rows}

    def _measure(
        self,
        site: Site,
        state: ServerState,
        lacking: Mapping[int | None, Lacking],
        deadline: float | None,
    ) -> Evaluated:
        """Have a site evaluate the global model; called in a thread of its own.

        Args:
            site: the site.
            state: the server's.
            lacking: round -> what a site lacks that holds the model of this round.
            deadline: a moment of `time.monotonic()`.
        """
        counted = site.trained or site.counted

        def ask(held: int | None) -> Evaluated:
            model = lacking[held] if held in lacking else self.server.model_lacking(held)
            self._bytes_to_evaluate.append(model.nbytes)
            message = with_counted(model_message(self._header(state.round, 0), model), counted)
            recover = partial(self._come_back, site, state.round)
            return self.calls.ask(site.name, message, read_evaluated, deadline, recover)

        return with_all_where_lost(ask, site.holds)

    def evaluate_client(
        self, client: int, model: Deltas, dense: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Evaluate a client's own model on the server's rows; without any, nothing."""
        return self.evaluator.of_client(client, model, dense) if self.session.data.eval else {}

    # --- what is saved ---

    def state(self) -> EngineState:
        """Which training of every site counts, and what its rows were; states stay at the sites."""
        sites = {
            site.name: {"counted": list(site.trained or site.counted), "data": site.joined.data}
            for site in self.sites.values()
        }
        return EngineState({"sites": sites})

    def restore(self, state: EngineState) -> None:
        """Go on from what was saved.

        Raises:
            InputError: a site's rows are not those it had, or what clients keep lies elsewhere.
        """
        if state.clients:
            raise InputError(
                "engine: every client of this run keeps a model of its own, which the sites do not "
                "have; go on with the engine it began with"
            )
        saved = state.facts.get("sites", {})
        for site in self.sites.values():
            if site.name not in saved:
                continue
            if saved[site.name]["data"] != site.joined.data:
                raise InputError(
                    f"sites: {site.name} has other rows than when the run began; give it back what "
                    "it had, or start a new run"
                )
            round, attempt = saved[site.name]["counted"]
            if not self._round or round < self._round:  # else of an attempt that is given up
                site.counted, site.trained = (round, attempt), None

    # --- the end ---

    def say_goodbye(self) -> None:
        """Tell all sites that the run is over, so that they may forget it; no answer is needed."""
        message = leave_message(self._header(self._committed, 0), Leave("the run is complete"))
        messages = {site.name: encode(message) for site in self.sites.values()}
        for _ in self.calls.transport.send(messages, time.monotonic() + _GOODBYE):
            pass

    def close(self) -> None:
        """Ask nobody any more."""
        self.calls.close()

    # --- telling ---

    def _pass_on(self) -> None:
        """Report what calls have told from their threads."""
        while True:
            try:
                self._warn(self._notices.get_nowait())
            except Empty:
                return

    def _warn(self, message: str) -> None:
        self.report(Notice(event="warning", message=message))


def _name_of_training(config: Config) -> str:
    """The name of the local training in checkpoints, as far as the server can know it."""
    if config.engine != "flower" or config.trains_at_sites:
        return seam.ELSEWHERE
    return name_of_trainer(training_of(config.train_function, train))

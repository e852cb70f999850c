"""Takes a run from its first round to its last: plan, exchange, fold, evaluate, save, log, end.

The course knows the server and the run's directory. Who carries messages to the clients, and where
these train, is the engine's to know (`fedlora.runs.engine`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedlora.errors import InputError
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import global_delta
from fedlora.federation.server import Server
from fedlora.methods import METHODS
from fedlora.methods.values import ServerState
from fedlora.runs.best_round import Best
from fedlora.runs.directory import RunDirectory, Saved
from fedlora.runs.engine import ELSEWHERE, Engine, EngineState, Joined
from fedlora.runs.events import (
    End,
    EvaluateBegin,
    Evaluations,
    Notice,
    Report,
    Resume,
    Round,
    Start,
)
from fedlora.runs.final_model import (
    FinalModel,
    model_of_round,
    model_of_state,
    write_global_model,
    write_personal_models,
)
from fedlora.runs.membership import admit, as_line, dismiss, in_words, with_all_ranks
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.results import Callbacks, Result, RoundResult
from fedlora.runs.round_clock import RoundClock
from fedlora.runs.round_line import round_line
from fedlora.runs.run_header import begin_event, header
from fedlora.runs.run_session import RunSession
from fedlora.runs.safe_writing import write_errors_are_explained
from fedlora.runs.state_file import settled
from fedlora.runs.training_round import Models, TrainingRound
from fedlora.text import finite
from fedlora.threads import Watcher


def make_server(session: RunSession, initial: ServerState, spool: Path) -> Server:
    """The server of a run.

    Args:
        session: of the run.
        initial: its state before round 1.
        spool: a directory for updates that come before those of lower clients.
    """
    return Server(session.federation, initial, Mean(), spool=spool)


def has_personal_models(session: RunSession) -> bool:
    """Whether every client has a model of its own and there is no global one: the rule says so."""
    config = session.config
    return bool(METHODS[config.method].training(config.rule_options()).keeps)


class Course:
    """One run in progress: the loop, and what has to be remembered between rounds.

    Args:
        session: the run's ingredients.
        directory: where it is written; locked for this process.
        initial: the server's state before round 1.
        engine: carries the messages; whoever made it closes it.
        callbacks: called after every committed and saved round.
        report: told about everything that happens.
    """

    def __init__(
        self,
        session: RunSession,
        directory: RunDirectory,
        initial: ServerState,
        engine: Engine,
        callbacks: Callbacks,
        report: Report,
    ) -> None:
        self.session, self.config, self.directory = session, session.config, directory
        self.engine, self.callbacks, self.report = engine, callbacks, report
        self.initial = initial
        self.server = make_server(session, initial, directory.path / ".spool.partial")
        self.threads = Watcher(self.config.num_threads or 1, session.own_threads)
        self.personal = has_personal_models(session)
        self.log: list[dict[str, Any]] = []
        self.best = Best()

    # --- from the beginning to the end ---

    def start(self) -> Result:
        """Run all rounds of a new run."""
        with write_errors_are_explained(self.directory.path):
            self._begin(resumed_from=None)
            return self._from_the_start()

    def resume(self) -> Result:
        """Go on after the newest round that can be trusted, and run the rounds that are left.

        Raises:
            InputError: model, data or local training differ from those the run began with.
        """
        with write_errors_are_explained(self.directory.path):
            saved, problems = self.directory.load_latest()
            if saved:
                self._check_same(saved)
            self.directory.mend_metrics()
            self.directory.sweep()
            number = saved.state.round if saved else 0
            self._begin(resumed_from=number)
            where = f"round {number}" if saved else "the start"
            for problem in problems:
                self._warn(f"{problem}; going on from {where}")
            self.directory.append(Resume(event="resume", round=number))
            if saved is None:
                return self._from_the_start()
            self._restore(saved)
            return self._rounds()

    def _begin(self, resumed_from: int | None) -> None:
        for warning in self.session.warnings:
            self._warn(warning)
        self.report(begin_event(self.session, self.directory.path, resumed_from))

    def _from_the_start(self) -> Result:
        first = dict(header(self.session))
        self.log.append(first)
        self.directory.append(first)
        line = Start(event="start", round=0, **self._evaluate())
        self._log(line)
        self._judge(0, line)
        return self._rounds()

    def _rounds(self) -> Result:
        while self.server.state.round < self.config.num_rounds and not self._stops_early():
            self._round()
        return self._end()

    def _stops_early(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.best.evaluations_since >= patience

    # --- going on with a run that was interrupted ---

    def _check_same(self, saved: Saved) -> None:
        for key, ours in self.engine.identity.items():
            theirs = saved.extra[key]
            if ours == theirs:
                continue
            if ELSEWHERE in (ours, theirs):
                self._warn(
                    f"the run goes on with another engine, which cannot tell whether the "
                    f"{key.replace('_', ' ')} is the one it began with"
                )
            else:
                named = f" ({theirs}, and {ours} now)" if key == "train_function" else ""
                raise InputError(
                    f"--resume {self.directory.path}: the {key.replace('_', ' ')} differs from the "
                    f"one the run began with{named}; restore it, or start a new run"
                )

    def _restore(self, saved: Saved) -> None:
        self.server.state = with_all_ranks(saved.state, self.server.federation)
        self.engine.restore(EngineState(saved.extra, saved.clients))
        self.best = Best(**saved.extra["best"])
        if "threads" in saved.extra:
            self.threads = Watcher(**saved.extra["threads"])
            torch.set_num_threads(self.threads.number)
        # Killed between saving a round and logging it, a run has it in the state alone.
        self.log = read_metrics(self.directory.path)
        if not any(x["event"] == "round" and x["round"] == saved.state.round for x in self.log):
            self._log(saved.line)

    # --- a round ---

    def _round(self) -> None:
        clock = RoundClock("aggregate")
        number = self.server.state.round + 1
        last = number == self.config.num_rounds
        due = last or bool(self.config.eval_rounds and number % self.config.eval_rounds == 0)
        training = TrainingRound(
            self.session,
            self.server,
            self.engine,
            self.report,
            clock,
            due=due,
            personal=self.personal,
        )
        training.run(self._take_in_changes)
        clock.now("aggregate")
        record = self.server.commit()
        self.server.state = settled(self.server.state)
        clock.now("evaluate")
        if not any(client.weight for client in record.clients):
            self._warn(f"no client counts in round {number}; the global model stays as it is")
        evaluations = self._evaluate() if due else Evaluations()
        line = round_line(
            record,
            evaluations,
            training.scores,
            attempts=training.attempts,
            given_up=training.given_up,
            seconds=clock.seconds(),
        )
        if self.threads.number != self.config.num_threads:
            line["num_threads"] = self.threads.number
        self._judge(number, line)
        self._save(line, training.models)
        for callback in self.callbacks:
            callback(RoundResult(record, self.log[-1], self.server.state))

    def _take_in_changes(self) -> None:
        """Let those in who have joined, and ask nobody who has left; both are logged."""
        number = self.server.state.round
        for change in self.engine.changes():
            if isinstance(change, Joined):
                admit(self.server, change)
            else:
                dismiss(self.server, change)
            self._warn(in_words(change, number))
            line = finite(as_line(change, number))
            self.log.append(line)
            self.directory.append(line)

    def _evaluate(self) -> Evaluations:
        if not self.engine.can_evaluate:
            return {}
        self.report(EvaluateBegin(event="evaluate_begin"))
        return self.engine.evaluate(self.server.state)

    def _judge(self, number: int, line: Evaluations) -> None:
        """Note whether this evaluation is the best one so far."""
        if scores := line.get("evaluation"):
            value = scores[self.config.metric_for_best_model.removeprefix("eval_")]
            greater = self.config.metric_is_better_when_greater
            self.best = self.best.after(number, value, greater=greater)

    def _save(self, line: Round, models: Models) -> None:
        """Save and log a round, with the number of threads that a resumed run goes on with."""
        crowded = self.threads.look()
        state, engine = self.server.state, self.engine.state()
        extra = {
            "best": dataclasses.asdict(self.best),
            **engine.facts,
            "threads": {"number": self.threads.number, "own": self.threads.own},
            **self.engine.identity,
        }
        plain = finite(line)
        delta = global_delta(state) if self._saves_adapter(state.round) else None
        targets = self.session.base.targets
        self.directory.save_round(delta, targets, state, plain, extra, engine.clients, models)
        self.log.append(plain)
        self.directory.append(plain)
        self.directory.prune(self.config.save_total_limit, self.best.round)
        self.report(plain)
        if crowded:
            torch.set_num_threads(self.threads.number)
            self._warn(f"from round {state.round + 1} on {crowded}")

    def _saves_adapter(self, number: int) -> bool:
        """Whether a round's directory is to hold the global model as a PEFT adapter."""
        may_be_final = self.config.load_best_model_at_end and number == self.best.round
        return may_be_final or number % self.config.save_adapter_rounds == 0

    # --- the end ---

    def _end(self) -> Result:
        self._take_in_changes()
        state, best, base = self.server.state, self.best.round, self.session.base
        final, kept = self._final_model(), self.engine.state().clients
        if self.personal and not kept:
            self._warn("every client keeps a model of its own; final/ has what all of them share")
        self._log(End(event="end", round=state.round, final=final.round, best=best))

        def fill(target: Path) -> None:
            if self.personal and kept:
                number = len(self.server.federation.ranks)
                write_personal_models(target, base, state, kept, number, final.dense)
            else:
                last_round = self.directory.path / f"round-{state.round}"
                write_global_model(target, base, final, last_round)

        final_dir = self.directory.save_final(fill)
        return Result(self.directory.path, final_dir, final.delta, list(self.log), best)

    def _final_model(self) -> FinalModel:
        """The last round's model, or the best round's where the configuration asks for it."""
        state, best = self.server.state, self.best.round
        if not self.config.load_best_model_at_end or best is None or best == state.round:
            return model_of_state(state)
        if best == 0:
            return model_of_state(self.initial)
        return model_of_round(self.directory.path, best)

    # --- telling ---

    def _log(self, line: Mapping[str, Any]) -> None:
        plain = finite(line)
        self.log.append(plain)
        self.directory.append(plain)
        self.report(plain)

    def _warn(self, message: str) -> None:
        self.report(Notice(event="warning", message=message))

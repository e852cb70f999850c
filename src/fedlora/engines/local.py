"""Runs a whole federation in one process, the reference for every other engine."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.saved_adapter import SavedAdapter, load_adapter, write_adapter
from fedlora.client.cohort import Cohorts
from fedlora.client.trainer import StepCallback, TrainFunction, name_of_trainer, train
from fedlora.client.worker import Worker
from fedlora.config.config import Config
from fedlora.config.sources import read_yaml
from fedlora.embedded import CONFIG as EMBEDDED_CONFIG
from fedlora.errors import CheckpointError, InputError
from fedlora.federation.exchange import global_delta
from fedlora.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlora.federation.records import RoundRecord
from fedlora.federation.server import Server
from fedlora.lowrank import Deltas, add_all
from fedlora.methods import METHODS
from fedlora.methods.values import ServerState
from fedlora.runs.directory import RunDirectory, Saved, check_free
from fedlora.runs.evaluation import Rating
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.resume import as_it_began, refuse_complete
from fedlora.runs.run_header import begin_line, config_file
from fedlora.runs.safe_writing import verify, write_errors_are_explained
from fedlora.runs.session import Session, assemble, starting_state
from fedlora.runs.state_file import settled
from fedlora.runs.trackers import observers
from fedlora.text import finite
from fedlora.threads import Watcher

Event = Mapping[str, Any]
Report = Callable[[Event], None]
"""Told about everything that happens, as `{"event": ..., ...}`."""


@dataclass(frozen=True)
class RoundResult:
    """What a callback is told after a round.

    Args:
        record: the round.
        metrics: its line in `metrics.jsonl`.
        state: the server's state after it.
    """

    record: RoundRecord
    metrics: Mapping[str, Any]
    state: ServerState


@dataclass(frozen=True)
class Result:
    """What a run returns.

    Args:
        output_dir: the run's directory.
        final_dir: the final adapter as a PEFT directory.
        adapter: the final global update, target module -> update.
        metrics: the lines of `metrics.jsonl`, in order.
        best_round: the round with the best metric; None without an evaluation.
    """

    output_dir: Path
    final_dir: Path
    adapter: Deltas
    metrics: list[dict[str, Any]]
    best_round: int | None

    @property
    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Round -> global evaluation, round 0 being the base."""
        return {
            line["round"]: line["evaluation"] for line in self.metrics if line.get("evaluation")
        }


def run(
    config: Config | None = None,
    *,
    resume: str | Path | None = None,
    train_function: TrainFunction = train,
    callbacks: Sequence[Callable[[RoundResult], None]] = (),
    report: Report = lambda event: None,
) -> Result:
    """Run a federation to its end, or go on with one that was interrupted.

    Sets torch's number of threads to `config.num_threads`; where that is left open, to no more than
    there are free cores, and to fewer when others come (a warning and the round's line say so).

    Args:
        config: what to run (None: the embedded default); with `resume`, None or the configuration
            the run began with.
        resume: the output directory of a run that was interrupted.
        train_function: `(model, dataset, budget) -> metrics`, the local training.
        callbacks: called after every committed and saved round.
        report: told about everything that happens.

    Raises:
        InputError: the configuration, the model or the data cannot be used; nothing is written.
        FedloraError: the run cannot go on (no space left); what was saved stays whole.
    """
    if resume is not None:
        refuse_complete(Path(resume), config)
        directory = RunDirectory.open(resume)
        try:
            session = assemble(as_it_began(directory.path, config))
            initial = starting_state(session)
            with _observed(session, directory, report) as told:
                return _Run(session, directory, initial, train_function, callbacks, told).resume()
        finally:
            directory.close()
    if config is None:
        config = Config(**read_yaml(EMBEDDED_CONFIG))
    check_free(config.output_dir)
    return run_session(
        assemble(config), train_function=train_function, callbacks=callbacks, report=report
    )


def run_session(
    session: Session,
    *,
    train_function: TrainFunction = train,
    callbacks: Sequence[Callable[[RoundResult], None]] = (),
    report: Report = lambda event: None,
) -> Result:
    """Run a federation whose model and data are loaded already; otherwise as `run`."""
    path = Path(session.config.output_dir)
    initial = starting_state(session)
    directory = RunDirectory.create(path, config_file(session))
    try:
        with _observed(session, directory, report) as told:
            return _Run(session, directory, initial, train_function, callbacks, told).start()
    finally:
        directory.close()


@contextmanager
def _observed(session: Session, directory: RunDirectory, report: Report) -> Iterator[Report]:
    """The user's report with `progress.json` and the trackers of `report_to` beside it."""
    with observers(session.config, directory.path) as observe:

        def told(event: Event) -> None:
            observe(event)
            report(event)

        yield told


@dataclass
class _Best:
    round: int | None = None
    value: float | None = None
    evaluations_since: int = 0


class _Run:
    """One run in progress: the loop, and what has to be remembered between rounds."""

    def __init__(
        self,
        session: Session,
        directory: RunDirectory,
        initial: ServerState,
        train_function: TrainFunction,
        callbacks: Sequence[Callable[[RoundResult], None]],
        report: Report,
    ) -> None:
        self.session, self.config, self.directory = session, session.config, directory
        self.callbacks = callbacks
        self.report: Report = lambda event: report(finite(event))
        self.log: list[dict[str, Any]] = []
        self.models: dict[int, tuple[Deltas, Mapping[str, Tensor]]] = {}
        self.best = _Best()
        self.initial = initial
        self.server = Server(
            session.federation,
            METHODS[self.config.method],
            self.config.rule_options(),
            initial,
            spool=directory.path / ".spool.partial",
        )
        clients = dict(enumerate(session.data.clients))
        self.states: dict[int, ClientState] = {}
        self.worker = Worker(session.base, clients, self.config, train_function, self.states)
        assert self.config.cohort_size != "auto", "assemble has settled it"
        self.cohorts = Cohorts(self.config.cohort_size, self._warn)
        self.threads = Watcher(self.config.num_threads or 1, session.own_threads)
        rule = METHODS[self.config.method]
        self.personal = bool(rule.training(self.config.rule_options()).keeps)
        self.rating = Rating(session, self.states, self.personal)

    # --- the course of a run ---

    def start(self) -> Result:
        with write_errors_are_explained(self.directory.path):
            self._begin()
            return self._from_the_start()

    def resume(self) -> Result:
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
            self.directory.append({"event": "resume", "round": number})
            if saved is None:
                return self._from_the_start()
            self._restore(saved)
            return self._rounds()

    def _check_same(self, saved: Saved) -> None:
        for key, ours in self._identity().items():
            if ours != saved.extra[key]:
                raise InputError(
                    f"--resume {self.directory.path}: the {key.replace('_', ' ')} differs from the "
                    "one the run began with; restore it, or start a new run"
                )

    def _identity(self) -> dict[str, str]:
        """What must be the same for a run to go on, beside its configuration."""
        return {
            **self.session.fingerprints,
            "train_function": name_of_trainer(self.worker.train_function),
        }

    def _restore(self, saved: Saved) -> None:
        self.server.state = saved.state
        self.states.update(saved.clients)
        self.best = _Best(**saved.extra["best"])
        self.cohorts.size = saved.extra["cohort_size"]
        if "threads" in saved.extra:
            self.threads = Watcher(**saved.extra["threads"])
            torch.set_num_threads(self.threads.number)
        # Killed between saving a round and logging it, a run has it in the state alone.
        self.log = read_metrics(self.directory.path)
        if not any(x["event"] == "round" and x["round"] == saved.state.round for x in self.log):
            self.directory.append(saved.line)
            self.log.append(saved.line)
            self.report(saved.line)

    def _begin(self, resumed_from: int | None = None) -> None:
        session, spec = self.session, self.session.federation
        for warning in session.warnings:
            self._warn(warning)
        self.report(
            {
                "event": "begin",
                "output_dir": str(self.directory.path),
                "resumed_from": resumed_from,
                "model": self.config.model_name_or_path,
                "method": self.config.method,
                "task": self.config.lora_task_type,
                "num_rounds": self.config.num_rounds,
                "parameters": sum(p.numel() for p in session.base.model.parameters()),
                "modules": len(spec.shapes),
                "ranks": list(spec.ranks),
                "rows": list(spec.num_examples),
                "eval_rows": len(session.data.eval),
                "choices": list(session.choices),
            }
        )

    def _from_the_start(self) -> Result:
        facts = begin_line(self.session)
        self.log.append(facts)
        self.directory.append(facts)
        line: dict[str, Any] = {"event": "start", "round": 0, **self._evaluate()}
        self._log(finite(line))
        self._judge(line)
        return self._rounds()

    def _rounds(self) -> Result:
        while self.server.state.round < self.config.num_rounds and not self._stop_early():
            self._round()
        return self._end()

    def _stop_early(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.best.evaluations_since >= patience

    def _round(self) -> None:
        began = time.perf_counter()
        broadcasts = self.server.plan()
        planned, folding = time.perf_counter(), 0.0
        number = self.server.state.round + 1
        self.report({"event": "round_begin", "round": number, "clients": list(broadcasts)})
        waiting = [broadcasts[client] for client in sorted(broadcasts)]
        last = number == self.config.num_rounds
        due = last or bool(self.config.eval_rounds and number % self.config.eval_rounds == 0)
        personal, rating = dict[str, Any](), 0.0
        self.models.clear()
        while waiting:
            size = self.cohorts.size if self.worker.joint else 1
            together, waiting = waiting[:size], waiting[size:]
            for broadcast in together:
                rank = broadcast.rank
                self.report({"event": "client_begin", "client": broadcast.client, "rank": rank})
            for update in self.cohorts.train(together, self._handle):
                client, before = update.client, time.perf_counter()
                problem = self.server.accept(update)
                folding += time.perf_counter() - before
                if problem:
                    self._warn(f"client {client} is left out of round {number}: {problem}")
                done = {"client": client, "metrics": update.metrics, "rejected": problem or ""}
                self.report({"event": "client_end", **done})
                before = time.perf_counter()
                if not problem and (scores := self._rate(broadcasts[client], update, due)):
                    personal[str(client)] = scores
                rating += time.perf_counter() - before
        trained = time.perf_counter()
        record = self.server.commit()
        self.server.state = settled(self.server.state)
        aggregated = time.perf_counter()
        if not any(c.weight for c in record.clients):
            self._warn(f"no client counts in round {number}; the global model stays as it is")
        line: dict[str, Any] = {"event": "round", **_plain(record)}
        if due:
            line |= self._evaluate()
        if personal:
            line["personal_evaluations"] = personal
        line["seconds"] = {
            "train": trained - planned - folding - rating,
            "aggregate": aggregated - trained + folding + planned - began,
            "evaluate": time.perf_counter() - aggregated + rating,
        }
        self._judge(line)
        if self.threads.number != self.config.num_threads:
            line["num_threads"] = self.threads.number
        line = finite(line)
        crowded = self.threads.look()  # before the state is saved: a resumed run goes on with it
        self._save(line)
        if crowded:
            torch.set_num_threads(self.threads.number)
            self._warn(f"from round {number + 1} on {crowded}")
        for callback in self.callbacks:
            callback(RoundResult(record, line, self.server.state))

    def _rate(self, sent: Broadcast, update: ClientUpdate, due: bool) -> dict[str, Any]:
        """The client's own model, kept and evaluated where that is asked for."""
        config, wanted = self.config, self.config.eval_personal and due
        if self.personal or not (wanted or config.save_client_models):
            return {}  # a rule with personal models evaluates and keeps them by itself
        model = self.worker.model_of(sent, update)
        if config.save_client_models:
            self.models[update.client] = model, update.dense
        return self.rating.of_client(update.client, model, update.dense) if wanted else {}

    def _handle(self, together: Sequence[Broadcast]) -> list[ClientUpdate]:
        return self.worker.handle_together(together, self._on_step)

    def _on_step(self, client: int) -> StepCallback:
        def on_step(step: int, steps: int, loss: float, tokens: int) -> None:
            self.report(
                {
                    "event": "step",
                    "client": client,
                    "step": step,
                    "steps": steps,
                    "loss": loss,
                    "tokens": tokens,
                }
            )

        return on_step

    def _save(self, line: dict[str, Any]) -> None:
        state = self.server.state
        extra = {
            "best": dataclasses.asdict(self.best),
            "cohort_size": self.cohorts.size,
            "threads": {"number": self.threads.number, "own": self.threads.own},
            **self._identity(),
        }
        self.log.append(line)
        self.directory.save_round(
            global_delta(state),
            self.session.base.targets,
            state,
            line,
            extra,
            self.states,
            self.models,
        )
        self.directory.append(line)
        self.directory.prune(self.config.save_total_limit, self.best.round)
        self.report(line)

    def _end(self) -> Result:
        state = self.server.state
        wanted, delta, dense = state.round, global_delta(state), state.dense
        if self.config.load_best_model_at_end and self.best.round not in (None, state.round):
            assert self.best.round is not None
            wanted = self.best.round
            delta, dense = global_delta(self.initial), self.initial.dense
            if wanted:
                best = self._saved_adapter(wanted)
                delta, dense = best.deltas, best.dense

        def fill(partial: Path) -> None:
            if self.personal:
                for client in range(len(self.session.federation.ranks)):
                    own = add_all([state.base_delta, self.rating.own(state, client)])
                    where = partial / f"client-{client}"
                    write_adapter(where, own, self.session.base.targets, dense)
            else:
                write_adapter(partial, delta, self.session.base.targets, dense)
                for one in sorted((self.directory.path / f"round-{state.round}").glob("client-*")):
                    shutil.copytree(one, partial / one.name)
            self.session.base.tokenizer.save_pretrained(partial)

        line = {"event": "end", "round": state.round, "final": wanted, "best": self.best.round}
        self._log(line)
        final = self.directory.save_final(fill)
        return Result(self.directory.path, final, delta, list(self.log), self.best.round)

    def _saved_adapter(self, number: int) -> SavedAdapter:
        path = self.directory.path / f"round-{number}"
        try:
            verify(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; it is the best round, which load_best_model_at_end needs. Remove all "
                f"round-* directories to train it again, then: fedlora run --resume "
                f"{self.directory.path}"
            ) from None
        return load_adapter(path)

    # --- small things ---

    def _log(self, line: dict[str, Any]) -> None:
        self.log.append(line)
        self.directory.append(line)
        self.report(line)

    def _warn(self, message: str) -> None:
        self.report({"event": "warning", "message": message})

    def _evaluate(self) -> dict[str, Any]:
        if not self.rating.possible:
            return {}
        self.report({"event": "evaluate_begin"})
        return self.rating.of_server(self.server.state)

    def _judge(self, line: Mapping[str, Any]) -> None:
        """Note whether this evaluation is the best one so far."""
        found = line.get("evaluation")
        if not found:
            return
        value = found[self.config.metric_for_best_model.removeprefix("eval_")]
        sign = 1.0 if self.config.metric_is_better_when_greater else -1.0
        if math.isfinite(value) and (
            self.best.value is None or sign * value > sign * self.best.value
        ):
            self.best = _Best(line["round"], value)
        else:
            self.best = replace(self.best, evaluations_since=self.best.evaluations_since + 1)


def _plain(record: RoundRecord) -> dict[str, Any]:
    """A record as JSON."""
    out = dataclasses.asdict(record)
    return {**out, "bytes_up": record.bytes_up, "bytes_down": record.bytes_down}

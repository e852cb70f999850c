"""Trains all clients in this process, the reference for every other engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora.client.cohort import Cohorts
from fedlora.client.local_training import StepCallback, TrainFunction
from fedlora.client.trainer import name_of_trainer, train, training_of
from fedlora.client.worker import Trained, Worker
from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import CONFIG as EMBEDDED_CONFIG
from fedlora.engines.run_sites import check_trains_itself, resume_with_sites, run_with_sites
from fedlora.errors import InputError
from fedlora.federation.messages import Broadcast, ClientState
from fedlora.lowrank import Deltas
from fedlora.methods.values import ServerState
from fedlora.runs.course import Course, has_personal_models
from fedlora.runs.directory import RunDirectory, check_free
from fedlora.runs.engine import ClientResult, Engine, EngineState, Exchange, Joined, Left
from fedlora.runs.evaluation import Evaluator
from fedlora.runs.events import ClientBegin, Evaluations, Notice, Report, Step, ignore
from fedlora.runs.file_names import CONFIG, as_written
from fedlora.runs.measured_choice import with_engine_of_here
from fedlora.runs.observers import observers
from fedlora.runs.results import Callbacks, Result
from fedlora.runs.resume import as_it_began, refuse_complete
from fedlora.runs.run_header import config_file
from fedlora.runs.session import Session, assemble, starting_state


def run(
    config: Config | None = None,
    *,
    resume: str | Path | None = None,
    train_function: TrainFunction = train,
    callbacks: Callbacks = (),
    report: Report = ignore,
    measure: bool = True,
) -> Result:
    """Run a federation to its end, or go on with one that was interrupted.

    Sets torch's number of threads to `config.num_threads`; where that is left open, to no more than
    there are free cores, and to fewer when others come (a warning and the round's line say so).

    Args:
        config: what to run (None: the embedded default); with `resume`, None or the configuration
            the run began with.
        resume: the output directory of a run that was interrupted.
        train_function: `(model, dataset, training) -> metrics`, the local training.
        callbacks: called after every committed and saved round.
        report: told about everything that happens (`fedlora.runs.events`).
        measure: whether a long run may time a few training steps to decide what is left open of how
            it trains. Without that the dtype and the clients in a pass, on which bytes depend, are
            those of any other run on the same model and rows.

    Raises:
        InputError: the configuration, the model or the data cannot be used; nothing is written.
        FedloraError: the run cannot go on (no space left); what was saved stays whole.
    """
    if resume is not None:
        refuse_complete(Path(resume), config)
        directory = RunDirectory.open(resume)
        try:
            began = as_it_began(directory.path, config)
            if began.engine == "flower":
                directory.close()  # it is the ServerApp's to open
                return _on_flower(began, train_function, callbacks, report, resume=True)
            if began.trains_at_sites:
                check_trains_itself(train_function)
                return _resume_at_sites(began, directory, callbacks, report)
            train_function = training_of(began.train_function, train_function)
            written = as_written((directory.path / CONFIG).read_text(encoding="utf-8"))
            began, changed = with_engine_of_here(began, written, config)
            session = assemble(began)
            session = replace(session, choices=(*session.choices, *changed))
            initial = starting_state(session)
            with _course(session, directory, initial, train_function, callbacks, report) as course:
                return course.resume()
        finally:
            directory.close()
    if config is None:
        config = Config(**read_yaml(EMBEDDED_CONFIG))
    check_free(config.output_dir)
    if config.engine == "flower":
        return _on_flower(config, train_function, callbacks, report, resume=False)
    train_function = training_of(config.train_function, train_function)
    if config.trains_at_sites:
        check_trains_itself(train_function)
        return _run_at_sites(config, callbacks, report)
    session = assemble(config, measure=measure and train_function is train)
    return run_session(session, train_function=train_function, callbacks=callbacks, report=report)


def _run_at_sites(config: Config, callbacks: Callbacks, report: Report) -> Result:
    if config.engine == "nvflare":
        from fedlora.engines.nvflare.submit import run_on_nvflare

        return run_on_nvflare(config, callbacks, report)
    return run_with_sites(config, callbacks, report)


def _resume_at_sites(
    config: Config, directory: RunDirectory, callbacks: Callbacks, report: Report
) -> Result:
    if config.engine == "nvflare":
        from fedlora.engines.nvflare.submit import resume_on_nvflare

        return resume_on_nvflare(config, directory, callbacks, report)
    return resume_with_sites(config, directory, callbacks, report)


def _on_flower(
    config: Config,
    train_function: TrainFunction,
    callbacks: Callbacks,
    report: Report,
    *,
    resume: bool,
) -> Result:
    """Run a federation, or go on with one, that a ServerApp of Flower serves.

    Raises:
        InputError: what is to be called lies in this process, and cannot travel there.
    """
    from fedlora.engines.flower.submit import check_training, submit

    check_training(config, train_function)
    if callbacks:
        raise InputError("callbacks: with engine: flower the server is another process; leave them")
    return submit(config, report, resume=resume)


def run_session(
    session: Session,
    *,
    train_function: TrainFunction = train,
    callbacks: Callbacks = (),
    report: Report = ignore,
) -> Result:
    """Run a federation whose model and data are loaded already; otherwise as `run`."""
    train_function = training_of(session.config.train_function, train_function)
    initial = starting_state(session)
    directory = RunDirectory.create(Path(session.config.output_dir), config_file(session))
    try:
        with _course(session, directory, initial, train_function, callbacks, report) as course:
            return course.start()
    finally:
        directory.close()


@contextmanager
def _course(
    session: Session,
    directory: RunDirectory,
    initial: ServerState,
    train_function: TrainFunction,
    callbacks: Callbacks,
    report: Report,
) -> Iterator[Course]:
    """The course of a run under the engine it asks for, while its listeners listen."""
    with (
        observers(session.config, directory.path, report) as tell,
        closing(_engine(session, train_function, tell)) as engine,
    ):
        yield Course(session, directory, initial, engine, callbacks, tell)


def _engine(session: Session, train_function: TrainFunction, report: Report) -> Engine:
    """The engine that the configuration asks for."""
    if session.config.engine == "workers":
        from fedlora.engines.workers import WorkersEngine  # it is made of the engine below

        return WorkersEngine(session, train_function, report)
    return LocalEngine(session, train_function, report)


def make_worker(
    session: Session, train_function: TrainFunction, states: MutableMapping[int, ClientState]
) -> Worker:
    """The worker that trains a run's clients.

    Args:
        session: of the run.
        train_function: the local training.
        states: client number -> what outlives a round at it; written to.
    """
    clients = dict(enumerate(session.data.clients))
    agreement = session.federation.agreement
    return Worker(
        session.base,
        clients,
        session.config,
        agreement,
        train_function,
        states,
        session.other_bases,
    )


class LocalEngine:
    """An engine (`fedlora.runs.engine.Engine`) whose clients all train in this process.

    As many clients as memory holds share a pass over the base. A client never fails alone here: an
    exception of a local training ends the run, as a mistake in a user's own training should.

    Args:
        session: of the run.
        train_function: the local training.
        report: told `client_begin` and `step` events, and warnings.
    """

    def __init__(self, session: Session, train_function: TrainFunction, report: Report) -> None:
        size = session.config.cohort_size
        assert size != "auto", "assemble has settled it"
        self.session, self.report = session, report
        self.states: dict[int, ClientState] = {}
        self.worker = make_worker(session, train_function, self.states)
        self.evaluator = Evaluator(session, self.states, has_personal_models(session))
        self.cohorts = Cohorts(size, self._warn)

    @property
    def identity(self) -> Mapping[str, str]:
        """Fingerprints of the base's weights and of all tokens, and the local training's name."""
        trainer = name_of_trainer(self.worker.train_function)
        return {**self.session.fingerprints, "train_function": trainer}

    @property
    def can_evaluate(self) -> bool:
        """Whether there is anything to evaluate the global model on."""
        return self.evaluator.possible

    def changes(self) -> Sequence[Joined | Left]:
        """Nobody joins or leaves."""
        return ()

    def exchange(self, broadcasts: Sequence[Broadcast], deadline: float | None = None) -> Exchange:
        """Train the clients, several in a pass; `deadline` is not needed, for every one answers.

        A round that is full trains no further pass.
        """
        begun = set[int]()

        def train_group(group: Sequence[Broadcast]) -> list[ClientResult]:
            for sent in group:
                if sent.client not in begun:  # else memory ran out, and it trains again
                    begun.add(sent.client)
                    self._tell_begin(sent)
            return self._train(group)

        with self.undoing(broadcasts) as unheard:
            for result in self.cohorts.train(broadcasts, train_group, joint=self.worker.joint):
                unheard.discard(result.client)
                yield result

    @contextmanager
    def undoing(self, broadcasts: Sequence[Broadcast]) -> Iterator[set[int]]:
        """An exchange, after which clients whose result nobody took are as they were before.

        They may have trained, in a pass with clients that count.

        Args:
            broadcasts: of the exchange.

        Returns:
            A context with the clients whose result is still to be taken; the caller removes those
            whose is.
        """
        before, unheard = dict(self.states), {sent.client for sent in broadcasts}
        try:
            yield unheard
        finally:
            for client in unheard & set(self.states):
                if client in before:
                    self.states[client] = before[client]
                else:
                    del self.states[client]

    def _train(self, group: Sequence[Broadcast]) -> list[ClientResult]:
        return [
            ClientResult(trained.update, partial(_model_of, trained))
            for trained in self.worker.handle_together(group, self._on_step)
        ]

    def evaluate(self, state: ServerState) -> Evaluations:
        """Evaluate the global model, or all clients' own ones; see `Evaluator.of_server`."""
        return self.evaluator.of_server(state)

    def evaluate_client(
        self, client: int, model: Deltas, dense: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Evaluate a client's own model; see `Evaluator.of_client`."""
        return self.evaluator.of_client(client, model, dense)

    def state(self) -> EngineState:
        """How many clients share a pass, and what outlives the round at the clients."""
        return EngineState({"cohort_size": self.cohorts.size}, dict(self.states))

    def restore(self, state: EngineState) -> None:
        """Go on from what was saved.

        Raises:
            InputError: what the clients keep lies at sites.
        """
        if "sites" in state.facts and has_personal_models(self.session):
            raise InputError(
                "engine: every site of this run keeps a model of its own, which is not here; go on "
                "with the engine it began with"
            )
        self.states.clear()  # it may be a round that is tried again, which leaves no trace
        self.states.update(state.clients)
        self.cohorts.size = state.facts.get("cohort_size", self.cohorts.size)

    def close(self) -> None:
        """Nothing was opened."""

    def _tell_begin(self, sent: Broadcast) -> None:
        self.report(ClientBegin(event="client_begin", client=sent.client, rank=sent.rank))

    def _on_step(self, client: int) -> StepCallback:
        def on_step(step: int, steps: int, loss: float, tokens: int) -> None:
            self.report(
                Step(event="step", client=client, step=step, steps=steps, loss=loss, tokens=tokens)
            )

        return on_step

    def _warn(self, message: str) -> None:
        self.report(Notice(event="warning", message=message))


def _model_of(trained: Trained) -> Deltas:
    return trained.model

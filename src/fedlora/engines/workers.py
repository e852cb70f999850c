"""Trains the clients in worker processes of this machine: one per core, or one per GPU.

Two torch threads of one process wait for each other at every operation; two processes of one thread
do not. Beside another busy program each of them loses its share and no more.

On a CPU the workers are forked, so that the base's weights lie in memory once, and so does what is
merged into them in a round. What travels
between the processes are the federation's own messages, as bytes (`fedlora.federation.wire`). The
same clients share a pass whichever worker trains them, and the server folds in client order; so
which worker trained whom changes no bit, and a run gives the bytes of one in a single process on
one thread with the same `cohort_size`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor

from fedlora.client.local_training import TrainFunction
from fedlora.client.trainer import train
from fedlora.client.worker import Worker
from fedlora.config.config import Config
from fedlora.engines.local import LocalEngine, make_worker
from fedlora.engines.pool_process import Clients, PoolProcess, Task, end, ending, with_stand_ins
from fedlora.engines.results import asked_modules, result_of
from fedlora.engines.worker_process import (
    FAILED,
    MERGED,
    STEP,
    STOP,
    frozen_for_all,
    give_back_memory,
    has_stopped,
    serve,
)
from fedlora.errors import FedloraError
from fedlora.federation.envelope import Header, Message, check_header, decode, encode
from fedlora.federation.messages import Broadcast
from fedlora.federation.wire import GroupNames, read_trained, train_message
from fedlora.lowrank import Deltas, LowRank
from fedlora.methods.tracking import none_like
from fedlora.methods.values import ServerState
from fedlora.runs.engine import ClientResult, EngineState, Exchange, Failure, Joined, Left
from fedlora.runs.events import ClientBegin, Evaluations, Notice, Report, Step
from fedlora.runs.session import Session, assemble

MOST_ATTEMPTS = 3
"""How often clients are asked to train whose worker process ends under them."""
PATIENCE = 5.0
"""Seconds a worker has to stop training; one that makes no step in this time is replaced."""

Outcome = ClientResult | Failure
"""What became of a client."""


class WorkerError(RuntimeError):
    """The local training raised an error in a worker process; its trace is among the notes."""


class WorkersEngine:
    """An engine (`fedlora.runs.engine.Engine`) whose clients train in processes of this machine.

    A worker that dies is replaced, and its clients train again. An exception of a local training
    ends the run, as in one process.

    Args:
        session: of the run; `config.num_workers` says how many processes.
        train_function: the local training.
        report: told `client_begin` and `step` events, and warnings.
        start_method: "fork" or "spawn", as `multiprocessing` has them; None: fork, but for a GPU,
            whose driver cannot be forked.
    """

    def __init__(
        self,
        session: Session,
        train_function: TrainFunction,
        report: Report,
        start_method: str | None = None,
    ) -> None:
        number = session.config.num_workers
        assert number != "auto", "assemble has settled it"
        self.session, self.report, self.train_function = session, report, train_function
        self.local = LocalEngine(session, train_function, report)
        self.method = start_method or ("fork" if session.base.device.type == "cpu" else "spawn")
        agreement = session.federation.agreement
        self.header = Header(
            secrets.token_hex(8), 0, 0, "", session.fingerprints["base"], agreement.digest
        )
        self._begun, self._merged = set[int](), False
        self._stand_ins: dict[str, LowRank] = {}
        self._adapter_merged = False
        if self.method == "fork":
            session.base.share_merged()
            give_back_memory()  # or each worker would write to pages of it and hold them itself
            # Python's collector of cycles writes to every object it looks at. What there is now is
            # left out, or every process would come to hold its own copy of all libraries' objects.
            gc.collect()
            gc.freeze()
        self._pool: list[PoolProcess] = []
        for place in range(number):
            self._pool.append(self._start(place))

    # --- processes ---

    def _start(self, place: int) -> PoolProcess:
        """Start the worker in a place of the pool."""
        context: Any = multiprocessing.get_context(self.method)
        ours, theirs = context.Pipe()
        make: Callable[[], Worker]
        if self.method == "fork":
            make = partial(make_worker, self.session, self.train_function, {})
            inherited: list[Any] = [ours, *(worker.connection for worker in self._pool)]
        else:
            gpu = place if self.session.base.device.type == "cuda" else None
            make = partial(_assembled, self.session.config, self.train_function, gpu)
            inherited = []
        process = context.Process(
            target=serve,
            args=(theirs, make, self.header, inherited),
            name=f"fedlora-worker-{place}",
            daemon=True,
        )
        process.start()
        theirs.close()
        return PoolProcess(process, ours)

    def _replace(self, worker: PoolProcess) -> None:
        """End a worker, and start another in its place."""
        end(worker, patience=0.0)
        place = self._pool.index(worker)
        del self._pool[place]  # its connection is closed; the new process must not look for it
        self._pool.insert(place, self._start(place))

    # --- a round ---

    def changes(self) -> Sequence[Joined | Left]:
        """Nobody joins or leaves."""
        return ()

    def exchange(self, broadcasts: Clients, deadline: float | None = None) -> Exchange:
        """Train the clients, as many in a pass as `cohort_size` says and a pass per worker.

        At the deadline, or when the round is full, workers that still train are told to stop.
        """
        self._begun.clear()
        self._regain_workers()
        for worker in self._pool:  # a round that is tried again names its groups anew
            worker.known = frozenset()
        self._merged = self._merge(broadcasts)
        names, sent = GroupNames(), {broadcast.client: broadcast for broadcast in broadcasts}
        waiting = deque(map(Task, self._grouped(broadcasts)))
        with self.local.undoing(broadcasts) as unheard:
            try:
                while waiting or self._busy:
                    self._hand_out(waiting, names)
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    ready = wait([worker.connection for worker in self._busy], left)
                    if not ready:
                        break
                    for worker in [w for w in self._busy if w.connection in ready]:
                        outcomes = self._hear(worker, waiting, sent)
                        self._hand_out(waiting, names)  # before the course folds what has come
                        for outcome in outcomes:
                            unheard.discard(outcome.client)
                            yield outcome
            finally:
                self._call_off()
            for client in sorted(unheard):
                yield Failure(client, "it was not done by the round's deadline", late=True)

    def _merge(self, broadcasts: Clients) -> bool:
        """Merge what lies frozen beside the base once for all workers, in memory they share.

        Each would else hold a copy of all weights that adapters change.

        Returns:
            Whether that was done: not where clients were sent different things, nor in processes
            that were not forked, nor where clients hold the base in several precisions.
        """
        self._stand_ins, self._adapter_merged = {}, False
        frozen = frozen_for_all(broadcasts, self.session.federation.agreement)
        if self.method != "fork" or not any(frozen) or self.session.other_bases:
            return False
        base = self.session.base
        base.merge_for_others(frozen)
        if self.train_function is train:  # a user's own merges for itself, and needs the numbers
            base_delta, shared = frozen
            updates = {**base_delta, **shared}
            names = base.merged_elsewhere & updates.keys()
            self._stand_ins = {name: none_like(updates[name]) for name in sorted(names)}
            self._adapter_merged = bool(shared)
        return True

    @property
    def _busy(self) -> list[PoolProcess]:
        return [worker for worker in self._pool if worker.task]

    def _grouped(self, broadcasts: Clients) -> list[Clients]:
        """Clients that share a pass, in their order."""
        size = self.local.cohorts.size if self.local.worker.joint else 1
        return [broadcasts[i : i + size] for i in range(0, len(broadcasts), size)]

    def _hand_out(self, waiting: deque[Task], names: GroupNames) -> None:
        """Give every idle worker something to do."""
        for worker in list(self._pool):
            if not waiting or worker.task:
                continue
            task = waiting.popleft()
            try:
                self._send(worker, task, names)
            except OSError:  # it has died while it was idle
                waiting.appendleft(task)
                self._replace(worker)

    def _send(self, worker: PoolProcess, task: Task, names: GroupNames) -> None:
        number = task.clients[0].round
        if worker.round != number:
            worker.round, worker.known = number, frozenset()
        header = replace(self.header, round=number, attempt=task.attempt)
        states = self.local.states
        clients = [
            with_stand_ins(sent, self._stand_ins, shared=self._adapter_merged)
            for sent in task.clients
        ]
        message, known = train_message(header, clients, states, names, worker.known)
        message = replace(message, body={**message.body, MERGED: self._merged})
        worker.connection.send_bytes(encode(message))
        worker.known, worker.task = known, task
        for broadcast in task.clients:
            if broadcast.client not in self._begun:
                self._begun.add(broadcast.client)
                event = ClientBegin(
                    event="client_begin", client=broadcast.client, rank=broadcast.rank
                )
                self.report(event)

    def _hear(
        self, worker: PoolProcess, waiting: deque[Task], sent: Mapping[int, Broadcast]
    ) -> list[Outcome]:
        """Read one message of a worker, or find that it has died.

        Returns:
            What became of its clients, where that is known now.
        """
        task = worker.task
        assert task is not None
        try:
            message = decode(worker.connection.recv_bytes())
        except (EOFError, OSError):
            return self._died(worker, task, waiting)
        number = task.clients[0].round
        check_header(message.header, replace(self.header, round=number, attempt=task.attempt))
        if message.header.kind == STEP:
            self.report(Step(event="step", **message.body))  # type: ignore[typeddict-item]
            return []
        worker.task = None
        if message.header.kind == FAILED:
            self._failed(message.body, task, waiting)
            return []
        agreement = self.session.federation.agreement
        updates, states = read_trained(
            message, {b.client: asked_modules(b, agreement.shapes) for b in task.clients}
        )
        answers: list[Outcome] = [
            result_of(sent[update.client], update, agreement) for update in updates
        ]
        self.local.states.update(states)
        return answers

    def _died(self, worker: PoolProcess, task: Task, waiting: deque[Task]) -> list[Outcome]:
        """Replace a worker that has ended; its clients train again, a few times."""
        worker.process.join(5)
        why = ending(worker.process.exitcode)
        self._replace(worker)
        clients = [broadcast.client for broadcast in task.clients]
        names = ", ".join(map(str, clients))
        if task.attempt + 1 < MOST_ATTEMPTS:
            waiting.appendleft(Task(task.clients, task.attempt + 1))
            self._warn(f"a worker process {why}; it is replaced, and trains anew: client {names}")
            return []
        return [
            Failure(client, f"its worker process {why}, {MOST_ATTEMPTS} times")
            for client in clients
        ]

    def _failed(self, body: Mapping[str, Any], task: Task, waiting: deque[Task]) -> None:
        """Go on with fewer clients in a pass where memory ran out; else end the run.

        Raises:
            FedloraError: what the training says that its user can mend.
            WorkerError: any other error of the training.
        """
        number = len(task.clients)
        if body["memory"] and number > 1:
            if number <= self.local.cohorts.size:
                self.local.cohorts.halve(number)
            again = [client for left in (task, *waiting) for client in left.clients]
            waiting.clear()
            waiting.extend(map(Task, self._grouped(again)))
            return
        if body["mistake"]:
            raise FedloraError(body["reason"])
        error = WorkerError(f"the local training failed in a worker process: {body['reason']}")
        error.add_note(body["trace"])
        raise error

    # --- stopping ---

    def _call_off(self) -> None:
        """Tell the workers that still train to stop; what they answer is dropped."""
        for worker in self._busy:
            worker.task, worker.stops_by = None, time.monotonic() + PATIENCE
            with suppress(OSError):  # it has died: `_regain_workers` finds out
                worker.connection.send_bytes(encode(Message(replace(self.header, kind=STOP), {})))

    def _regain_workers(self) -> None:
        """Wait for those that were told to stop, and replace those that go on, or have died."""
        for worker in list(self._pool):
            if worker.stops_by is None:
                continue
            if has_stopped(worker.connection, worker.stops_by):
                worker.stops_by = None
            else:
                self._replace(worker)

    # --- all else is as in one process ---

    @property
    def identity(self) -> Mapping[str, str]:
        """As of an engine in one process, so that either goes on with the other's run."""
        return self.local.identity

    @property
    def can_evaluate(self) -> bool:
        """Whether there is anything to evaluate the global model on."""
        return self.local.can_evaluate

    def evaluate(self, state: ServerState) -> Evaluations:
        """Evaluate the global model in this process, while the workers wait."""
        return self.local.evaluate(state)

    def evaluate_client(
        self, client: int, model: Deltas, dense: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Evaluate a client's own model in this process."""
        return self.local.evaluate_client(client, model, dense)

    def state(self) -> EngineState:
        """How many clients share a pass, and what outlives the round at the clients."""
        return self.local.state()

    def restore(self, state: EngineState) -> None:
        """Go on from what was saved."""
        self.local.restore(state)

    def close(self) -> None:
        """End all workers."""
        for worker in self._pool:
            end(worker, patience=0.0 if worker.task or worker.stops_by else 5.0)
        self._pool.clear()
        if self.method == "fork":
            gc.unfreeze()

    def _warn(self, message: str) -> None:
        self.report(Notice(event="warning", message=message))


def _assembled(config: Config, train_function: TrainFunction, gpu: int | None) -> Worker:
    """A worker that loads model and data itself, on one of the machine's GPUs or on the CPU."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    session = assemble(config)
    torch.set_num_threads(1)
    return make_worker(session, train_function, {})

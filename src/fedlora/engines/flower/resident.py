"""Holds the clients of a simulated run: one base, forked into a few processes, a socket for each.

    python -m fedlora.engines.flower.resident DIRECTORY

started by `fedlora.engines.flower.simulation`. The first process loads the base and all rows; its
forks share them in memory. Each fork answers for some of the clients, one after the other, as
`fedlora worker` does for a site. All end when the first one's standard input is closed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fedlora.client.local_training import TrainFunction
from fedlora.client.trainer import train, training_of
from fedlora.client.worker import Worker
from fedlora.config.config import Config
from fedlora.config.site import Site
from fedlora.config.yaml_file import read_yaml
from fedlora.engines.flower.simulated_sockets import simulated_name
from fedlora.engines.flower.simulation import FAILED, READY, SETTINGS, STATES
from fedlora.engines.site_listener import Listener
from fedlora.engines.site_run import Loaded
from fedlora.engines.site_service import Answer, SiteService
from fedlora.engines.worker_process import end_with_parent
from fedlora.errors import FedloraError
from fedlora.runs.session import Session, assemble
from fedlora.runs.site_report import SiteReport
from fedlora.runs.site_session import SiteSession


class SimulatedClient:
    """Answers calls in the place of one client's worker (`fedlora.engines.site_listener.Worker`).

    Args:
        service: of the client.
    """

    def __init__(self, service: SiteService) -> None:
        self.service = service

    def handle(self, message: bytes, seconds: float | None) -> bytes:
        """The answer to a message; raises SiteError."""
        return self.service.handle(message, seconds)

    def status(self) -> dict[str, Any]:
        """What it is at."""
        return self.service.status()

    def cancel(self) -> None:
        """Give up what it is at."""
        self.service.cancel()

    def stop(self) -> None:
        """Nothing: it ends with the run."""


def service_of(session: Session, client: int, states: Path, lock: threading.Lock) -> SiteService:
    """The service of one client, on the base that all of them share.

    It trains as the run's configuration says (`train_function`).

    Args:
        session: of the whole run.
        client: its number.
        states: where clients keep what outlives a round.
        lock: held while an answer is made: one client uses the base at a time.
    """
    name = simulated_name(client, len(session.data.clients))
    site = Site(
        name=name,
        state_dir=str(states / name),
        settings={"model_name_or_path": session.config.model_name_or_path},
    )

    def load(site: Site, config: Config, client: int, train_function: TrainFunction) -> Loaded:
        return loaded_of(session, config, client, train_function)

    def alone(answer: Answer) -> bytes:
        with lock:
            return answer()

    train_function = training_of(session.config.train_function, train)
    return SiteService(site, train_function, run_in=alone, load=load)


def loaded_of(
    session: Session, config: Config, client: int, train_function: TrainFunction
) -> Loaded:
    """What a simulated client holds in memory: the base of all, and its own rows.

    Where the run has common rows to evaluate on, the first client evaluates on them, and nobody on
    rows of its own: the evaluation is then that of a run in one process.
    """
    data = session.data.clients[client]
    base = session.other_bases.get(client, session.base)
    federation = session.federation
    common = bool(session.config.eval_file or session.config.dataset_test_split)
    common = common or session.config.eval_fraction > 0
    eval_rows = (session.data.eval if client == 0 else ()) if common else data.eval
    report = SiteReport(
        client=client,
        name=simulated_name(client, len(session.data.clients)),
        num_examples=len(data.train),
        rank=federation.ranks[client],
        label_names=session.label_names,
        base=base.fingerprint,
        data=session.data.fingerprint,
    )
    agreement = federation.agreement
    return Loaded(
        config,
        client,
        SiteSession(session.config, base, data, agreement, report, eval_rows),
        Worker(base, {client: data}, session.config, agreement, train_function),
        eval_rows,
        base.read_full_params(),
    )


def serve(session: Session, directory: Path, clients: Sequence[int]) -> None:
    """Answer for some of the clients until the process ends.

    Args:
        session: of the whole run.
        directory: of the sockets.
        clients: their numbers.
    """
    torch.set_num_threads(1)
    lock = threading.Lock()
    for client in clients:
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(directory / f"{client}.sock"))
        server.listen()
        service = service_of(session, client, directory / STATES, lock)
        Listener(server, SimulatedClient(service), token=None).start()


def main(directory: Path) -> int:
    """Load, fork, and wait for the end; the exit code."""
    try:
        config = Config(**read_yaml(directory / SETTINGS))
        training_of(config.train_function, train)  # what cannot be imported is said now
        session = assemble(config.model_copy(update={"engine": "workers", "sites": None}))
    except FedloraError as error:
        (directory / FAILED).write_text(str(error))
        return 2
    number = session.config.num_workers
    assert number != "auto", "assemble has settled it"
    clients = range(len(session.data.clients))
    (directory / STATES).resolve().mkdir(parents=True, exist_ok=True)
    forks = [_fork(session, directory, clients[place::number]) for place in range(number)]
    _write_whole(directory / READY, json.dumps({"clients": len(clients)}))
    sys.stdin.buffer.read()  # until the ServerApp's process has ended
    for pid in forks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return 0


def _fork(session: Session, directory: Path, clients: Sequence[int]) -> int:
    """Start a process that answers for these clients, and wait until it can be called: its id."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid:
        os.close(told)
        os.read(ready, 1)  # or nothing, where the fork has ended
        os.close(ready)
        return pid
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(session, directory, clients)
    os.write(told, b"!")
    threading.Event().wait()
    raise AssertionError("it waits for ever")


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is whole as soon as it is there."""
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(text)
    hidden.rename(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""Starts the workers of a simulated run, which share one base, and ends them with it.

Flower simulates nodes in actors of Ray. If each of them trained by itself, each would hold the base
and load torch. Here they carry bytes to a few resident processes, forked from one that has loaded
the base once (`fedlora.engines.flower.resident`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid

from fedlora.config.config import Config
from fedlora.engines.flower.simulated_sockets import socket_directory
from fedlora.errors import FedloraError, InputError

READY, FAILED, SETTINGS, STATES = "ready.json", "failed.txt", "config.yaml", "states"
"""Names in the directory of a simulation: written by the resident process (how many clients there
are; why it cannot begin) and for it (the configuration; where clients keep what outlives a
round)."""

_LOOK = 0.1  # seconds between two looks whether it is ready
_PATIENCE = 10.0  # seconds in which it has to end


def is_simulation(grid: Grid) -> bool:
    """Whether a grid's nodes are simulated on this machine."""
    return type(grid).__name__ == "InMemoryGrid"


@contextmanager
def simulated_workers(grid: Grid, context: Context, config: Config) -> Iterator[tuple[Config, int]]:
    """The workers of all simulated clients, for as long as the run goes on.

    Args:
        grid, context: as Flower hands them to a ServerApp.
        config: of the run, whose data is divided among the clients.

    Yields:
        The server's configuration and the number of clients.

    Raises:
        InputError: the configuration cannot be used, or there are not as many nodes as clients.
    """
    if not (config.train_file or config.dataset_name):
        raise InputError(
            "no data: a simulation divides train_file or dataset_name among its nodes; give one as "
            "run-config"
        )
    nodes = len(list(grid.get_node_ids()))
    if config.num_clients is None and not isinstance(config.client_ranks, list):
        config = config.model_copy(update={"num_clients": nodes})
    directory = socket_directory(context.run_id)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    states = Path(f"{Path(config.output_dir).absolute()}.clients")
    (directory / SETTINGS).write_text(config.to_yaml())
    (directory / STATES).symlink_to(states, target_is_directory=True)
    resident = subprocess.Popen(
        [sys.executable, "-m", "fedlora.engines.flower.resident", str(directory)],
        stdin=subprocess.PIPE,
    )
    try:
        number = _wait_until_ready(resident, directory)
        if number != nodes:
            raise InputError(
                f"num_clients: there are {number} clients and {nodes} simulated nodes; give flwr "
                f"run --federation-config 'num-supernodes={number}'"
            )
        yield of_server(config), number
        shutil.rmtree(states, ignore_errors=True)  # the run is complete
    finally:
        _end(resident)
        shutil.rmtree(directory, ignore_errors=True)


def of_server(config: Config) -> Config:
    """The server's configuration: without rows, and without weights unless it has text to read."""
    update = {"server_evaluation": config.general_file is not None}
    return config.model_copy(update=update)


def _wait_until_ready(resident: subprocess.Popen[bytes], directory: Path) -> int:
    """Wait until the clients' workers can be called: how many there are.

    Raises:
        InputError: what cannot be used.
        FedloraError: the process has ended.
    """
    while not (directory / READY).exists():
        code = resident.poll()
        if code is not None and (directory / FAILED).exists():
            raise InputError((directory / FAILED).read_text())
        if code is not None:
            raise FedloraError(
                f"the process that holds the clients has ended with code {code}; Flower's log says "
                "more"
            )
        time.sleep(_LOOK)
    return int(json.loads((directory / READY).read_text())["clients"])


def _end(resident: subprocess.Popen[bytes]) -> None:
    """End the resident process: it does when its standard input is closed."""
    assert resident.stdin is not None
    resident.stdin.close()
    try:
        resident.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        resident.kill()
        resident.wait()

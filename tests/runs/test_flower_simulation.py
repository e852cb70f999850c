"""Simulated runs: clients on one base answer behind sockets, as in the resident processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.engines.flower import client_app
from fedlora.engines.flower.grid_transport import GridTransport
from fedlora.engines.flower.resident import STATES, serve
from fedlora.engines.flower.server_app import run_or_resume
from fedlora.engines.flower.simulated_sockets import socket_directory
from fedlora.engines.flower.simulation import of_server
from fedlora.engines.site_calls import SiteCalls
from fedlora.runs.events import Event, ignore
from fedlora.runs.results import Result
from fedlora.runs.session import assemble
from support.conformance import Keys, check_same_bytes, for_rule, in_memory, three_clients
from support.flower_grid import InProcessGrid

pytestmark = pytest.mark.usefixtures("kept_bases")


class Simulated:
    """Carries a run to clients of one process, on one base."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(
        self,
        keys: Keys,
        out: Path,
        events: list[Event] | None = None,
        callbacks: Sequence[Callable[[Any], None]] = (),
    ) -> Result:
        assert not callbacks, "a ServerApp calls nobody back"
        config = Config(**{**keys, "engine": "flower", "output_dir": str(out)})
        session = assemble(config.model_copy(update={"engine": "workers", "num_workers": 1}))
        (self.directory / STATES).mkdir()
        clients = range(len(session.data.clients))
        serve(session, self.directory, clients)
        nodes = [{"partition-id": k, "num-partitions": len(clients)} for k in reversed(clients)]
        grid = InProcessGrid(client_app.app, nodes)

        def make(config: Config, tell: Callable[[str], None]) -> SiteCalls:
            return SiteCalls(GridTransport(grid, len(clients), 20.0), tell)

        report = events.append if events is not None else ignore
        return run_or_resume(of_server(config), False, report, make)


@pytest.fixture
def simulated() -> Iterator[Simulated]:
    directory = socket_directory(1)  # of the grid in this process
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    yield Simulated(directory)
    shutil.rmtree(directory)


@pytest.fixture
def keys(small_run: Keys) -> Keys:
    return three_clients(small_run)


@pytest.mark.parametrize("method", ["exact", "fedex"])
def test_a_simulation_gives_the_bytes_of_a_run_in_one_process(
    simulated: Simulated, keys: Keys, tmp_path: Path, method: str
) -> None:
    check_same_bytes(simulated, {**for_rule(keys, method), "num_rounds": 2}, tmp_path)


def test_its_evaluation_on_common_rows_is_that_of_a_run_in_one_process(
    simulated: Simulated, keys: Keys, small_run: Keys, tmp_path: Path
) -> None:
    keys = {**keys, "eval_file": small_run["eval_file"], "num_rounds": 1}
    one = in_memory(keys, tmp_path / "memory")
    other = simulated(keys, tmp_path / "simulated")
    assert one.evaluations == other.evaluations
    assert len(one.evaluations) == 2


OWN = """
def half(model, dataset, training):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)
    return {"loss": 0.5}
"""


def test_clients_of_a_simulation_train_as_the_configuration_says(
    simulated: Simulated, keys: Keys, tmp_path: Path
) -> None:
    (tmp_path / "own_of_simulation.py").write_text(OWN)
    own = {"train_function": f"{tmp_path}/own_of_simulation.py:half", "num_rounds": 1}
    check_same_bytes(simulated, {**keys, **own}, tmp_path)

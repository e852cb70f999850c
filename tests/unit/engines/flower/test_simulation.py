"""Workers of a simulation: what is refused before any process is started."""

from __future__ import annotations

import pytest
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from fedlora.config.config import Config
from fedlora.engines.flower import client_app
from fedlora.engines.flower.simulation import is_simulation, simulated_workers
from fedlora.errors import InputError
from support.flower_grid import InProcessGrid
from support.flower_sites import server_context


def test_flower_s_grid_of_simulated_nodes_is_known() -> None:
    assert is_simulation(InMemoryGrid.__new__(InMemoryGrid))
    assert not is_simulation(InProcessGrid(client_app.app, []))


def test_a_simulation_without_data_is_refused() -> None:
    grid = InProcessGrid(client_app.app, [])
    with (
        pytest.raises(InputError, match="no data: a simulation divides"),
        simulated_workers(grid, server_context({}), Config(engine="flower")),
    ):
        pass

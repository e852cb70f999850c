"""What is kept on disk."""

from __future__ import annotations

from fedlora.config.config import Config
from fedlora.runs.planning.plan import disk_of_server
from fedlora.runs.planning.simulated_traffic import Traffic


def test_rounds_that_are_kept_count() -> None:
    traffic = Traffic(0, 0, 0, 0, model=10, state=100, updates=0, adds_to_base=False, played=1)
    assert disk_of_server(Config(num_rounds=9, save_total_limit=3), traffic) == 3 * 110 + 10
    assert disk_of_server(Config(num_rounds=9, save_total_limit=1), traffic) == 2 * 110 + 10
    assert disk_of_server(Config(num_rounds=9, save_total_limit=None), traffic) == 9 * 110 + 10

"""The ServerApp: whom it tells what happens, and what becomes of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.config.config import Config
from fedlora.engines.flower import client_app, server_app
from fedlora.engines.flower.event_lines import read_event
from fedlora.errors import InputError
from support.flower_grid import InProcessGrid
from support.flower_sites import server_context


def test_a_mistake_is_told_as_an_event_before_it_ends_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid = InProcessGrid(client_app.app, [])
    with pytest.raises(InputError):
        server_app.main(grid, server_context({"lora_rank": 4, "events": True}))
    event = read_event(capsys.readouterr().out)
    assert event is not None
    assert event["event"] == "error"
    assert "lora_rank: unknown" in event["message"]


def test_a_complete_run_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    config = Config(output_dir=str(tmp_path), engine="flower")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(InputError, match="the run is complete"):
        server_app.run_or_resume(config, True, lambda event: None, None)  # type: ignore[arg-type]


def test_nodes_that_do_not_connect_end_the_run() -> None:
    grid = InProcessGrid(client_app.app, [])
    config = Config(engine="flower", client_ranks=[4, 2], node_timeout=0.01, output_dir="unused")
    with pytest.raises(InputError, match="0 of 2 nodes are connected"):
        server_app.serve(grid, server_context({}), config, False, lambda event: None)


def test_a_training_of_the_server_s_does_not_reach_sites() -> None:
    """Across machines, even where the run-config names rows as a simulation would."""
    grid = InProcessGrid(client_app.app, [])
    config = Config(engine="flower", train_file="rows.jsonl", train_function="mine:half")
    with pytest.raises(InputError, match="train_function: sites train by themselves"):
        server_app.serve(grid, server_context({}), config, False, lambda event: None)

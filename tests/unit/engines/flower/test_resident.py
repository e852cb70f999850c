"""The process that holds the clients of a simulation: what it says when it cannot begin."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.config import Config
from fedlora.engines.flower.resident import main
from fedlora.engines.flower.simulation import FAILED, READY, SETTINGS


def test_what_cannot_be_used_is_left_for_the_server_app(tmp_path: Path) -> None:
    config = Config(engine="flower", train_file=str(tmp_path / "missing.jsonl"))
    (tmp_path / SETTINGS).write_text(config.to_yaml())
    assert main(tmp_path) == 2
    assert "missing.jsonl" in (tmp_path / FAILED).read_text()
    assert not (tmp_path / READY).exists()

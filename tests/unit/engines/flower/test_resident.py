"""The process that holds the clients of a simulation: what it says when it cannot begin."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedlora.client.trainer import name_of_trainer, train
from fedlora.config.config import Config
from fedlora.engines.flower.resident import main, service_of
from fedlora.engines.flower.simulation import FAILED, READY, SETTINGS


def test_what_cannot_be_used_is_left_for_the_server_app(tmp_path: Path) -> None:
    config = Config(engine="flower", train_file=str(tmp_path / "missing.jsonl"))
    (tmp_path / SETTINGS).write_text(config.to_yaml())
    assert main(tmp_path) == 2
    assert "missing.jsonl" in (tmp_path / FAILED).read_text()
    assert not (tmp_path / READY).exists()


def session_of(train_function: str | None) -> Any:
    """A session with nothing but its configuration and two clients."""
    config = Config(train_function=train_function)
    return SimpleNamespace(config=config, data=SimpleNamespace(clients=[1, 2]))


def test_a_client_trains_as_the_configuration_says(tmp_path: Path) -> None:
    (tmp_path / "own_of_resident.py").write_text("def half(model, dataset, training): return {}\n")
    own = f"{tmp_path}/own_of_resident.py:half"
    service = service_of(session_of(own), 1, tmp_path, threading.Lock())
    assert name_of_trainer(service.train_function) == "own_of_resident.half"
    assert service_of(session_of(None), 1, tmp_path, threading.Lock()).train_function is train


def test_a_training_that_is_not_there_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    keys = {"train_file": "rows.jsonl", "train_function": f"{tmp_path}/absent.py:half"}
    (tmp_path / SETTINGS).write_text(Config(engine="flower", **keys).to_yaml())
    assert main(tmp_path) == 2
    assert "train_function: " in (tmp_path / FAILED).read_text()

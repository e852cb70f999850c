"""A run whose sites are other processes: what is refused before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.client.trainer import train
from fedlora.config.config import Config
from fedlora.engines.run_sites import calls_on_sockets, check_trains_itself, run_with_sites
from fedlora.errors import InputError


def test_a_local_training_of_ones_own_cannot_travel() -> None:
    def mine(model: Any, rows: Any, training: Any) -> dict[str, float]:
        return {}

    check_trains_itself(train)
    with pytest.raises(InputError, match="train_function: sites train by themselves"):
        check_trains_itself(mine)


def test_a_socket_that_is_not_there_is_named_and_nothing_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(
        model_name_or_path=str(tiny_llama),
        engine="sites",
        sites={"b": "b.sock", "a": "a.sock"},
        output_dir=str(tmp_path / "out"),
    )
    assert list(calls_on_sockets(config, print).transport.names()) == ["a", "b"]
    with pytest.raises(InputError, match=rf"sites: a: {tmp_path}/a.sock: no worker has its socket"):
        run_with_sites(config, (), print)
    assert not (tmp_path / "out").exists()

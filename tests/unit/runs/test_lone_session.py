"""A client that trains by itself keeps its rows, rank and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.runs.lone_session import alone
from fedlora.runs.session import assemble


def test_one_client_of_a_session(small_run: dict[str, Any], tmp_path: Path) -> None:
    session = assemble(Config(**{**small_run, "method": "exact"}), weights=False)
    lone = alone(session, 1, tmp_path / "lone")
    assert list(lone.federation.ranks) == [4]
    assert list(lone.federation.num_examples) == [16]
    assert lone.data.clients == (session.data.clients[1],)
    assert (lone.config.method, lone.config.num_clients, lone.lone) == ("fedit", 1, 1)
    assert lone.config.max_steps == session.config.max_steps


def test_a_client_without_rows(small_run: dict[str, Any], tmp_path: Path) -> None:
    from dataclasses import replace

    session = assemble(Config(**small_run), weights=False)
    first = replace(session.data.clients[0], train=[])
    empty = replace(session, data=replace(session.data, clients=(first,)))
    with pytest.raises(InputError, match="client 0 has no rows"):
        alone(empty, 0, tmp_path)

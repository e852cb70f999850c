"""The embedded default configuration, assembled as the demo runs it."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import CONFIG
from fedlora.runs.lone_session import alone
from fedlora.runs.session import assemble


def test_the_embedded_default_is_what_the_documentation_says() -> None:
    session = assemble(Config(**{**read_yaml(CONFIG), "num_threads": 1}))
    assert list(session.federation.ranks) == [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
    assert sum(session.federation.num_examples) == 2400
    assert len(session.data.eval) == 480
    assert session.config.eval_exact_match is True


def test_a_client_alone_keeps_its_rows_and_rank(tmp_path: Path) -> None:
    session = assemble(Config(**{**read_yaml(CONFIG), "num_threads": 1}))
    lone = alone(session, 3, tmp_path / "alone")
    assert list(lone.federation.ranks) == [16]
    assert lone.data.clients == (session.data.clients[3],)
    assert lone.data.eval is session.data.eval

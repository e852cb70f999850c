"""What is run, on what and with what, as listeners and files are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora import __version__
from fedlora.config.config import Config
from fedlora.config.sources import read_yaml
from fedlora.runs.events import Begin, Header
from fedlora.runs.file_names import AS_WRITTEN
from fedlora.runs.run_header import begin_event, config_file, header
from fedlora.runs.session import Session, assemble


@pytest.fixture
def session(small_run: dict[str, Any]) -> Session:
    """Four clients of ranks 8, 4, 2, 2; shapes alone."""
    return assemble(Config(**small_run), weights=False)


def test_what_a_run_tells_when_it_begins(session: Session, tmp_path: Path) -> None:
    event = begin_event(session, tmp_path, None)
    assert event.keys() == Begin.__annotations__.keys()
    assert (event["ranks"], event["rows"], event["eval_rows"]) == (
        [8, 4, 2, 2],
        [24, 16, 12, 8],
        10,
    )
    assert event["resumed_from"] is None
    assert begin_event(session, tmp_path, 3)["resumed_from"] == 3


def test_the_first_line_of_the_metrics(session: Session) -> None:
    line = header(session)
    assert line.keys() == Header.__required_keys__
    assert json.loads(json.dumps(line)) == line
    assert line["fedlora"] == __version__
    assert line["architecture"] == "LlamaForCausalLM"
    assert len(line["modules"]) == 14  # seven linear layers in each of two
    assert [client["rank"] for client in line["clients"]] == [8, 4, 2, 2]
    of_first = session.data.clients[0].train
    assert line["clients"][0]["tokens"] == sum(len(row["input_ids"]) for row in of_first)
    assert line["clients"][0]["name"] == "site_0.jsonl"


def test_the_configuration_keeps_what_the_user_wrote(session: Session, tmp_path: Path) -> None:
    text = config_file(session)
    (tmp_path / "config.yaml").write_text(text)
    assert Config(**read_yaml(tmp_path / "config.yaml")).flat() == session.config.flat()
    *_, last = text.splitlines()
    assert last.startswith(AS_WRITTEN)
    asked = json.loads(last.removeprefix(AS_WRITTEN))
    assert asked["template"] == "auto"
    assert "learning_rate" not in asked

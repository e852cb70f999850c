"""`fedlora config`: every key, its value and what it does."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.commands.config import verb
from fedlora.config.config import Config
from fedlora.config.schema import config_schema
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import CONFIG
from fedlora.errors import InputError


def test_what_is_printed_is_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(["--num_rounds", "7", "--method", "hetlora"]) == 0
    text = capsys.readouterr().out
    config = Config(num_rounds=7, method="hetlora")
    assert Config(**yaml.safe_load(text)).flat() == config.flat()
    assert all(" # " in line for line in text.splitlines())


def test_the_embedded_one_and_a_file(tmp_path: Path) -> None:
    told: list[Any] = []
    verb(["embedded"], told.append)
    assert told[0] == Config(**read_yaml(CONFIG)).flat()
    (tmp_path / "my.yaml").write_text("num_rounds: 3\n")
    verb([str(tmp_path / "my.yaml"), "--seed", "5"], told.append)
    assert (told[1]["num_rounds"], told[1]["seed"]) == (3, 5)


def test_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[Any] = []
    assert verb(["--schema"]) == verb(["--schema"], told.append) == 0
    assert json.loads(capsys.readouterr().out) == told[0] == config_schema()
    with pytest.raises(InputError, match="--schema is the same for all; give it alone"):
        verb(["--schema", "my.yaml"])


def test_the_app_for_flower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num_rounds", "7", "--engine", "flower", "--client_ranks", "8", "4"]
    verb([*arguments, "--flower_app", str(tmp_path / "app")])
    assert capsys.readouterr().out == f"flwr run {tmp_path / 'app'} --stream\n"
    app = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    given = {key: value for key, value in app["config"].items() if value != ""}
    assert given == {"num_rounds": 7, "client_ranks": "[8, 4]", "resume": False, "events": False}

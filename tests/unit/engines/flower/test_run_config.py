"""A configuration as Flower's run-config, and back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.engines.flower.run_config import bundle_text, config_of, write_bundle
from fedlora.errors import InputError


def run_config(text: str) -> dict[str, Any]:
    """What Flower reads of a bundle."""
    flat: dict[str, Any] = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    return flat


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"client_ranks": [8, 4, 2], "lora_target_modules": ["q_proj", "v_proj"]},
        {"clients_per_round": 0.3, "save_total_limit": None, "completion_template": 'a "b"\n{c}\\'},
        {"client_overrides": {1: {"lora_r": 4}}, "method": "exact", "start_fraction": 0.25},
        {"lora_alpha": 32.0, "use_rslora": True, "num_clients": 3},
    ],
)
def test_every_key_comes_back_as_it_was(values: dict[str, Any]) -> None:
    config = Config(engine="flower", **values)
    assert config_of(run_config(bundle_text(config.flat()))).flat() == config.flat()


def test_a_bundle_names_every_key_and_the_apps(tmp_path: Path) -> None:
    write_bundle(tmp_path / "app", {})
    text = (tmp_path / "app" / "pyproject.toml").read_text()
    config = run_config(text)
    assert set(Config().flat()) <= set(config)
    assert set(Config(method="hetlora").flat()) <= set(config)
    assert config_of(config) == Config(engine="flower")
    assert [path.name for path in (tmp_path / "app").iterdir()] == ["pyproject.toml"]


def test_lists_are_written_as_on_the_command_line() -> None:
    given = {"client_ranks": "8 4 2", "lora_target_modules": "[q_proj, v_proj]", "seed": "none"}
    given.pop("seed")
    config = config_of({**given, "save_total_limit": "none", "resume": True})
    assert config.client_ranks == [8, 4, 2]
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.save_total_limit is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_rank": 4}, "lora_rank: unknown configuration key"),
        ({"num_rounds": "many"}, "num_rounds"),
        ({"client_ranks": "[8, 4"}, "client_ranks: .* neither a list nor a table"),
        ({"engine": "local"}, "engine: local in a Flower app"),
    ],
)
def test_mistakes_are_told_by_their_key(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(given)

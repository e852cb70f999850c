"""Translates between a configuration and Flower's run-config, and writes the app's bundle.

Flower takes numbers, texts and truth values alone. A list or a table is written as YAML
(`[8, 4, 2]`) or, as on the command line, with spaces (`8 4 2`); an empty text means that a key is
not given. Keys have the names that `fedlora config` shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedlora import __version__
from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.methods import rule_keys

RESUME, EVENTS = "resume", "events"
"""Keys of the app that are no configuration's: go on with the run in `output_dir` after its last
whole round; tell the run's events as lines of JSON."""

_APP = {RESUME: False, EVENTS: False}

_BUNDLE = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedlora-app"
version = "{version}"
description = "Federated LoRA fine-tuning with mixed ranks: fedlora as a Flower app"
license = "Apache-2.0"
dependencies = ["fedlora[flower]"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedlora"

[tool.flwr.app.components]
serverapp = "fedlora.engines.flower.server_app:app"
clientapp = "fedlora.engines.flower.client_app:app"

# An empty text: the key is not given. A list: "8 4 2". What each means: fedlora config
[tool.flwr.app.config]
{config}
"""


def bundle_text(values: Mapping[str, Any], **app: bool) -> str:
    """The `pyproject.toml` of the app, with every configuration key in its run-config.

    Args:
        values: flat keys that are set; all others are there as empty texts.
        app: `resume`, `events`.
    """
    keys = [key for key in Config.model_fields if key != "method_options"]
    keys += sorted(rule_keys())
    lines = [f"{key} = {_toml(values.get(key, ''))}" for key in keys]
    lines += [f"{key} = {_toml(app.get(key, default))}" for key, default in _APP.items()]
    return _BUNDLE.format(version=__version__, config="\n".join(lines))


def write_bundle(directory: Path, values: Mapping[str, Any], **app: bool) -> None:
    """Write the app's bundle: a directory with a `pyproject.toml` that points at this package.

    Raises:
        InputError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "pyproject.toml").write_text(bundle_text(values, **app), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from None


def _toml(value: Any) -> str:
    """A value as TOML writes it."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def config_of(run_config: Mapping[str, Any]) -> Config:
    """The configuration that a run-config says.

    Raises:
        InputError: an unknown key or an impossible value.
    """
    values = {
        key: _meant(key, value)
        for key, value in run_config.items()
        if key not in _APP and value != ""
    }
    values.setdefault("engine", "flower")
    if values["engine"] != "flower":
        raise InputError(f"engine: {values['engine']} in a Flower app; leave it out")
    return Config(**values)


def _meant(key: str, value: Any) -> Any:
    """A value as a configuration's file would hold it."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "null"):
        return None
    if value[0] in "[{":
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"{key}: {value[:80]} is neither a list nor a table in YAML") from None
    if _takes_list(key) and " " in value:
        return value.split()
    return value


def _takes_list(key: str) -> bool:
    """Whether several words may be given for a key."""
    field = Config.model_fields.get(key)
    return field is not None and "list[" in str(field.annotation)

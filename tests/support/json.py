"""Types commands with `--json`, and reads the lines that they write."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.commands.cli import main

Told = Callable[..., list[dict[str, Any]]]


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.fixture
def here(tmp_path: Path, small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `my.yaml`, two short rounds into `out`."""
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    keys = {**small_run, "output_dir": "out", "max_steps": 1}
    (path / "my.yaml").write_text(yaml.safe_dump(keys))
    return path


@pytest.fixture
def told(here: Path, capfd: pytest.CaptureFixture[str]) -> Told:
    """Types a command with --json; gives the objects it writes."""

    def typed(line: str, code: int = 0) -> list[dict[str, Any]]:
        capfd.readouterr()
        found = main([*shlex.split(line), "--json"])
        captured = capfd.readouterr()
        assert found == code, captured.err
        return [json.loads(x, parse_constant=no_constant) for x in captured.out.splitlines()]

    return typed

"""Sets up a directory to look at before running, and reads the tables and bars that are shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.commands.cli import main
from support.rows import rows, write_jsonl
from support.script import _offline, _signals_as_they_were, files

__all__ = [
    "Say",
    "_offline",
    "_signals_as_they_were",
    "bars_of",
    "files",
    "here",
    "say",
    "table_of",
]


@pytest.fixture
def here(tmp_path: Path, small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory: `my.yaml`, a run of sites; `all.jsonl`, 60 rows of ten kinds."""
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    keys = {**small_run, "output_dir": "out"}
    (path / "my.yaml").write_text(yaml.safe_dump(keys))
    write_jsonl(path / "all.jsonl", rows(60))
    return path


Say = Callable[[str], str]


@pytest.fixture
def say(here: Path, capfd: pytest.CaptureFixture[str]) -> Say:
    """Types a command that succeeds and writes no file; gives what it prints."""

    def typed(line: str) -> str:
        before = files(here)
        code = main(shlex.split(line))
        captured = capfd.readouterr()
        assert (code, captured.err) == (0, "")
        assert files(here) == before
        assert "\x1b" not in captured.out
        return captured.out

    return typed


def table_of(text: str) -> tuple[list[str], list[list[str]]]:
    """The headings of a table and its rows, cell by cell."""
    found = text.splitlines()
    ruler = next(i for i, line in enumerate(found) if set(line.strip()) == {"─"})
    body = []
    for line in found[ruler + 1 :]:
        if not line.strip():
            break
        body.append(line.split())
    return found[ruler - 1].split(), body


def bars_of(text: str) -> dict[int, tuple[str, int]]:
    """Every client's bar and the number after it."""
    found = re.findall(r"^ +(\d+) ([a-z]*) ([\d,]+)$", text, re.M)
    return {int(k): (bar, int(n.replace(",", ""))) for k, bar, n in found}

"""Runs the installed `fedlora` as a shell does, and keeps what tests change in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

FEDLORA = str(Path(sys.executable).parent / "fedlora")
"""The installed script."""

_CHANGING = ("FORCE_COLOR", "TTY_COMPATIBLE", "PYTHONUNBUFFERED", "COLUMNS", "LINES")


def environment() -> dict[str, str]:
    """A user's, in which nothing says what the terminal can show."""
    usual = {name: value for name, value in os.environ.items() if name not in _CHANGING}
    return {**usual, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm"}


def run_script(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `fedlora`, piped, in a directory."""
    return subprocess.run(
        [FEDLORA, *argv], cwd=cwd, env=environment(), capture_output=True, text=True
    )


_IN_TURN = """
import os, shlex, sys
from pathlib import Path
from fedlora.commands.cli import main
where, *lines = sys.argv[1:]
for number, line in enumerate(lines):
    for descriptor, name in ((1, "out"), (2, "err")):
        path = os.path.join(where, f"{number}.{name}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    code = main(shlex.split(line))
    sys.stdout.flush()
    sys.stderr.flush()
    Path(where, f"{number}.code").write_text(str(code))
"""


@dataclass(frozen=True)
class Said:
    """A command's exit code, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_in_turn(*lines: str, cwd: Path) -> list[Said]:
    """Run several command lines in one process, which takes most of its time to start."""
    with tempfile.TemporaryDirectory() as where:
        command = [sys.executable, "-c", _IN_TURN, where, *lines]
        subprocess.run(command, cwd=cwd, env=environment(), check=True)

        def read(number: int, kind: str) -> str:
            return Path(where, f"{number}.{kind}").read_text()

        return [
            Said(int(read(n, "code")), read(n, "out"), read(n, "err")) for n in range(len(lines))
        ]


def files(path: Path) -> dict[str, bytes]:
    """The content of every file under a directory."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """What a verb sets for SIGTERM does not outlive the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked for models or data, and no variable says what the terminal can show."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def site(here: Path, small_run: dict[str, Any]) -> Path:
    """A working directory with `my.yaml`, a run of two short rounds into `out`."""
    keys = {**small_run, "output_dir": "out", "max_steps": 1}
    (here / "my.yaml").write_text(yaml.safe_dump(keys))
    return here

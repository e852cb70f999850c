"""Takes the course of a run under an engine that a test brings, and reads what it leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from fedlora.config.config import Config
from fedlora.runs.course import Course
from fedlora.runs.directory import RunDirectory
from fedlora.runs.engine import Engine
from fedlora.runs.events import Event, Report
from fedlora.runs.observers import observers
from fedlora.runs.results import Result
from fedlora.runs.run_header import config_file
from fedlora.runs.session import Session, assemble, starting_state


def take_course(
    keys: Mapping[str, Any],
    output_dir: Path,
    engine_of: Callable[[Session, Report], Engine],
    events: list[Event] | None = None,
) -> Result:
    """A whole run under the engine that is made of its session and of who is told its events."""
    session = assemble(Config(**{**keys, "output_dir": str(output_dir)}))
    directory = RunDirectory.create(output_dir, config_file(session))
    hear = (events if events is not None else []).append
    with (
        closing(directory),
        observers(session.config, output_dir, hear) as tell,
        closing(engine_of(session, tell)) as engine,
    ):
        return Course(session, directory, starting_state(session), engine, (), tell).start()


def tensor_files(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of tensors of a run: two that differ are shown by name at once."""
    paths = sorted(directory.rglob("*.safetensors"))
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }

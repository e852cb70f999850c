"""Keeps a run's directory on the admin's machine like the server's, and tells who listens there.

While the run goes on, its log and its progress are followed line by line, so that `fedlora watch`
and `status` work on it; saved rounds and the final model come with the result of the job.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from fedlora.config.config import Config
from fedlora.config.keys import Mark, keys_marked
from fedlora.engines.nvflare.feed import Outcome
from fedlora.engines.nvflare.order import rounds_in
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.directory import RunDirectory
from fedlora.runs.events import Event, Report
from fedlora.runs.file_names import AS_WRITTEN, CONFIG, FINAL, METRICS
from fedlora.runs.observers import observers

_OF_THIS_MACHINE = (
    Mark.OUTPUT, Mark.CARRIER, Mark.MACHINE, Mark.ABSOLUTE, Mark.DIRECTORY, Mark.FILE
)  # fmt: skip


class Mirror:
    """A run that goes on at a server, in a directory here.

    Use as a context manager; it locks the directory as long as it lasts.

    Args:
        config: of the run, as it was asked for here.
        report: told about everything that happens.
        directory: of a run that goes on; None: a new one, made when the server has begun.
    """

    def __init__(self, config: Config, report: Report, directory: RunDirectory | None) -> None:
        self.config, self.report = config, report
        self.path = Path(config.output_dir)
        self.heard = False
        self._stack, self._directory, self._tell = ExitStack(), directory, report
        self._metrics = b""
        self._events = 0
        if directory is not None and (self.path / METRICS).is_file():
            self._metrics = (self.path / METRICS).read_bytes()

    def __enter__(self) -> Mirror:
        self._stack.__enter__()
        if self._directory is not None:
            self._listen()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def _listen(self) -> None:
        self._tell = self._stack.enter_context(observers(self.config, self.path, self.report))

    @property
    def rounds(self) -> int:
        """How many lines of rounds the log has; more of them, and the run has come further."""
        return self._metrics.count(b'"event": "round"')

    def tell(self, event: Event) -> None:
        """Tell who listens."""
        self._tell(event)

    # --- while the run goes on ---

    def next_job(self) -> None:
        """Another job begins, which tells its events from the first one on."""
        self._events, self.heard = 0, False

    def question(self) -> dict[str, Any]:
        """What to ask the server."""
        sha256 = hashlib.sha256(self._metrics).hexdigest()
        return {"events": self._events, "metrics": len(self._metrics), "sha256": sha256}

    def take(self, answer: Mapping[str, Any]) -> Outcome | None:
        """Take in what the server answers, and tell it; gives how the job has ended, if it has."""
        self.heard = True
        if answer["config"] is not None:
            self._make(answer["config"])
            self._add(answer["offset"], answer["metrics"].encode())
        self._events += len(answer["events"])
        for event in answer["events"]:
            if event["event"] == "begin":
                event = {**event, "output_dir": str(self.path)}
            self._tell(event)
        outcome = answer["outcome"]
        return None if outcome is None else Outcome(**outcome)

    def _make(self, config: str) -> None:
        if self._directory is None:
            self._directory = RunDirectory.create(self.path, own_config(config, self.config))
            self._stack.callback(self._directory.close)
            self._listen()

    def _add(self, offset: int, lines: bytes) -> None:
        """Put lines behind the known ones, or in the place of those that the server has not."""
        if not lines and offset == len(self._metrics):
            return
        self._metrics = self._metrics[:offset] + lines
        with (self.path / METRICS).open("r+b" if (self.path / METRICS).exists() else "wb") as file:
            file.seek(offset)
            file.write(lines)
            file.truncate()

    # --- at the end ---

    def install(self, result: Path) -> None:
        """Take over the files of a run that came with the result of its job.

        Args:
            result: a directory on the same disk, which is emptied.
        """
        if not (result / CONFIG).is_file():
            return
        self._make((result / CONFIG).read_text(encoding="utf-8"))
        for number in set(rounds_in(self.path)) - set(rounds_in(result)):
            shutil.rmtree(self.path / f"round-{number}")
        for number in rounds_in(result):
            if not (self.path / f"round-{number}").is_dir():
                os.rename(result / f"round-{number}", self.path / f"round-{number}")
        if (result / METRICS).is_file():
            self._add(0, (result / METRICS).read_bytes())
        if (result / FINAL).is_dir() and not (self.path / FINAL).is_dir():
            os.rename(result / FINAL, self.path / FINAL)


def own_config(text: str, config: Config) -> str:
    """A run's `config.yaml` as this machine keeps it: paths and carrier are its own.

    Args:
        text: the server's.
        config: as the run was asked for here.
    """
    values = yaml.safe_load(text)
    here = resolve_paths(config)
    for key in keys_marked(Config, *_OF_THIS_MACHINE):
        if key != "num_threads":
            values[key] = getattr(here, key)
    _, _, asked = text.rpartition(AS_WRITTEN)
    written = f"{AS_WRITTEN}{asked}" if AS_WRITTEN in text else ""
    return yaml.safe_dump(values, sort_keys=False) + written

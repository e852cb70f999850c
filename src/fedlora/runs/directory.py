"""Keeps a run's directory: makes it, locks it, adds rounds to it, and finds where to go on.

    config.yaml      the resolved configuration; appears together with the directory
    metrics.jsonl    one line per event, only ever appended to
    round-N/         the global model after round N as a PEFT directory (in every one, or as
                     `save_adapter_rounds` says), and in `state/` what a resumed run needs;
                     `manifest.json` holds the SHA-256 of every file
    final/           the final adapter as a PEFT directory, and the tokenizer

Whatever moment a run is killed at, a `round-N` that exists is whole, or known to be damaged.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fedlora.adapters.peft_files import CONFIG_NAME, save_tensors
from fedlora.adapters.saved_adapter import write_adapter
from fedlora.errors import CheckpointError, InputError
from fedlora.federation.messages import ClientState
from fedlora.lowrank import Deltas
from fedlora.methods.values import ServerState
from fedlora.model.targets import Targets
from fedlora.runs.file_names import CONFIG, FINAL, LOCK, METRICS, PARTIAL_CONFIG, ROUND
from fedlora.runs.metrics_log import append_line, cut_off_half_a_line
from fedlora.runs.safe_writing import (
    read_manifest,
    remove_directory,
    set_aside,
    sync,
    verify,
    write_directory,
    write_text,
)
from fedlora.runs.saved_state import read_server_state, write_server_state
from fedlora.runs.state_file import clients_from_tensors, clients_to_tensors

_STATE, _FACTS = "state", "state.json"
_CLIENTS = "clients.safetensors"


@dataclass(frozen=True)
class Saved:
    """What a resumed run goes on from.

    Args:
        state: the server's state after the round.
        clients: what outlives the round at the clients.
        line: the round's line of `metrics.jsonl`, which a killed run may not have logged yet.
        extra: what else the run keeps (the best round, fingerprints).
    """

    state: ServerState
    line: dict[str, Any]
    extra: dict[str, Any]
    clients: dict[int, ClientState] = field(default_factory=dict)


class RunDirectory:
    """One run's directory, locked while this process writes to it.

    Use `create` for a new run and `open` for one to go on with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._lock = (path / LOCK).open("a")
        except OSError as error:
            raise InputError(f"{path}: cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            busy = isinstance(error, BlockingIOError)
            why = "another process is writing to this run" if busy else error.strerror
            raise InputError(f"{path}: {why}") from None

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    @classmethod
    def create(cls, path: str | Path, config_yaml: str) -> RunDirectory:
        """Make the directory and its `config.yaml` in one step.

        A directory that is there already, and empty, is kept: it may be a mount point or somebody's
        working directory.

        Raises:
            InputError: it holds another run or other files, or cannot be made.
        """
        path = Path(path)
        check_free(path)
        try:
            if path.is_dir():
                _write_config_into(path, config_yaml)
            else:
                _make_with_config(path, config_yaml)
        except OSError as error:
            raise InputError(f"output_dir: {path}: cannot be made: {error.strerror}") from None
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Open a run to go on with.

        Raises:
            InputError: there is no run, or it has ended.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise InputError(f"--resume {path}: nothing to resume; there is no {CONFIG}")
        if (path / FINAL).is_dir():
            raise InputError(f"--resume {path}: nothing to resume; the run is complete")
        return cls(path)

    # --- metrics ---

    def append(self, line: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl` and force it to the disk."""
        append_line(self.path / METRICS, line)

    def mend_metrics(self) -> None:
        """Cut off a last line that was half written when a run was killed."""
        cut_off_half_a_line(self.path / METRICS)

    # --- rounds ---

    def rounds(self) -> list[int]:
        """The rounds on the disk, ascending, whole or damaged."""
        matches = (ROUND.fullmatch(p.name) for p in self.path.iterdir() if p.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def save_round(
        self,
        delta: Deltas | None,
        targets: Targets,
        state: ServerState,
        line: Any,
        extra: Any,
        clients: Mapping[int, ClientState] | None = None,
        models: Mapping[int, tuple[Deltas, Mapping[str, Tensor]]] | None = None,
    ) -> Path:
        """Write `round-N/`: the global model as a PEFT directory, and the state to resume from.

        Args:
            delta: the global model's difference from the base; None: only the state is written.
            targets: the base's target modules.
            state: the server's state after the round.
            line: the round's line of `metrics.jsonl`, as JSON can hold it.
            extra: what else the run keeps, as JSON can hold it.
            clients: what outlives the round at the clients.
            models: the clients' own models with their parameters trained whole, where they are
                kept; they are written to `client-K/`.

        Returns:
            The directory.
        """

        before = self.path / f"round-{state.round - 1}"

        def fill(partial: Path) -> dict[str, str]:
            if delta is not None:
                write_adapter(partial, delta, targets, state.dense)
            for client, (own, dense) in (models or {}).items():
                write_adapter(partial / f"client-{client}", own, targets, dense)
            return _write_state(partial, state, clients or {}, line, extra, before)

        target = self.path / f"round-{state.round}"
        write_directory(target, fill)
        return target

    def prune(self, limit: int | None, keep: int | None) -> None:
        """Remove all but the newest `limit` rounds (never fewer than two) and round `keep`.

        The newest one that holds an adapter stays too.
        """
        if limit is None:
            return
        rounds = self.rounds()
        newest = max((number for number in rounds if self._has_adapter(number)), default=None)
        for number in rounds[: -max(2, limit)]:
            if number not in (keep, newest):
                remove_directory(self.path / f"round-{number}")

    def _has_adapter(self, number: int) -> bool:
        return (self.path / f"round-{number}" / CONFIG_NAME).is_file()

    def sweep(self) -> None:
        """Remove what a killed run left half written or half removed."""
        for pattern in (".*.partial", ".round-*.removed"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def load_latest(self) -> tuple[Saved | None, list[str]]:
        """The newest round that can be trusted, and what is wrong with those after it.

        Damaged ones are set aside as `round-N.damaged`, so that they count as rounds no more.

        Returns:
            None where no round can be trusted (or none was saved): the run begins at its start.
        """
        problems: list[str] = []
        for number in reversed(self.rounds()):
            try:
                return load_round(self.path / f"round-{number}"), problems
            except CheckpointError as error:
                problems.append(str(error))
                set_aside(self.path / f"round-{number}")
        return None, problems

    # --- the end ---

    def save_final(self, fill: Callable[[Path], None]) -> Path:
        """Write `final/`; its presence says that the run is complete."""
        write_directory(self.path / FINAL, fill)
        return self.path / FINAL


def check_free(path: str | Path) -> None:
    """Refuse an output directory that holds anything.

    Raises:
        InputError: it holds another run, or other files.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"output_dir: {path} is a file")
    if (path / CONFIG).exists():
        done = (path / FINAL).is_dir()
        advice = "" if done else f", or go on with it: fedlora run --resume {path}"
        raise InputError(
            f"output_dir: {path} holds {'a complete' if done else 'another'} run; choose another "
            f"--output_dir{advice}"
        )
    if any(p.name not in (LOCK, PARTIAL_CONFIG) for p in path.iterdir()):
        raise InputError(f"output_dir: {path} is not empty; choose another --output_dir")


def _write_config_into(path: Path, config_yaml: str) -> None:
    """Put `config.yaml` into an empty directory that is there already."""
    write_text(path / PARTIAL_CONFIG, config_yaml)
    (path / PARTIAL_CONFIG).rename(path / CONFIG)
    sync(path)


def _make_with_config(path: Path, config_yaml: str) -> None:
    """Make a directory that never is without its `config.yaml`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_text(partial / CONFIG, config_yaml)
    sync(partial)
    partial.rename(path)
    sync(path.parent)


def _write_state(
    round_dir: Path,
    state: ServerState,
    clients: Mapping[int, ClientState],
    line: Any,
    extra: Any,
    before: Path,
) -> dict[str, str]:
    """Write what a resumed run needs beside the global model.

    Args:
        round_dir: the directory of the round; its state goes to `state/` in it.
        state: of the server.
        clients: what outlives the round at the clients.
        line: the round's line of `metrics.jsonl`.
        extra: what else the run keeps.
        before: the directory of the round before; it need not exist.

    Returns:
        The SHA-256 of those files that are links to files of the round before, by their paths.
    """
    directory = round_dir / _STATE
    directory.mkdir()
    try:
        known = read_manifest(before)
    except CheckpointError:  # there is none, or it has been removed
        known = {}
    links = write_server_state(directory, state, before / _STATE if known else None)
    if clients:
        save_tensors(directory / _CLIENTS, clients_to_tensors(clients))
    facts = {
        "round": state.round,
        "ranks": {str(k): v for k, v in state.ranks.items()},
        "last_seen": {str(k): v for k, v in state.last_seen.items()},
        "extra": extra,
        "line": line,
    }
    (directory / _FACTS).write_text(json.dumps(facts) + "\n")
    return {f"{_STATE}/{name}": known[f"{_STATE}/{file.name}"] for name, file in links.items()}


def load_round(path: Path) -> Saved:
    """A saved round, verified.

    Raises:
        CheckpointError: it is damaged.
    """
    verify(path)
    directory = path / _STATE
    facts = json.loads((directory / _FACTS).read_text())
    state = read_server_state(
        directory,
        facts["round"],
        {int(k): v for k, v in facts["last_seen"].items()},
        {int(k): v for k, v in facts["ranks"].items()},
    )
    kept = directory / _CLIENTS
    clients = clients_from_tensors(load_file(kept)) if kept.is_file() else {}
    return Saved(state, facts["line"], facts["extra"], clients)


def append_eval(path: str | Path, line: Mapping[str, Any]) -> None:
    """Append an `eval` line to a run's `metrics.jsonl`, be the run complete or not.

    Args:
        path: the run's directory.
        line: event, round, name, model, scores.

    Raises:
        InputError: another process is writing to the run, or it cannot be written to.
    """
    directory = RunDirectory(Path(path))
    try:
        directory.mend_metrics()
        directory.append(line)
    except OSError as error:
        raise InputError(f"{path}: cannot be written to: {error.strerror}") from None
    finally:
        directory.close()

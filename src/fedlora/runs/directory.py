"""Writes a run's directory safely, and checks it before a run goes on from it.

    config.yaml      the resolved configuration; appears together with the directory
    metrics.jsonl    one line per event, only ever appended to
    round-N/         the global model after round N as a PEFT directory, and in `state/` what a
                     resumed run needs; `manifest.json` holds the SHA-256 of every file
    final/           the final adapter as a PEFT directory, and the tokenizer

A directory is written under a name beginning with a dot and renamed when all of it is on the disk,
so whatever moment a run is killed at, a `round-N` that exists is whole, or known to be damaged.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fedlora.adapters.peft_files import save_tensors
from fedlora.adapters.saved_adapter import write_adapter
from fedlora.errors import CheckpointError, FedloraError, InputError
from fedlora.federation.messages import ClientState
from fedlora.lowrank import Deltas
from fedlora.methods.values import ServerState
from fedlora.model.targets import Targets
from fedlora.runs.file_names import (
    CONFIG,
    FINAL,
    LOCK,
    MANIFEST,
    METRICS,
    PARTIAL_CONFIG,
)
from fedlora.runs.state_file import (
    CLIENTS,
    clients_from_tensors,
    clients_to_tensors,
    from_copies,
    state_to_tensors,
)

_ROUND = re.compile(r"^round-(\d+)$")


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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a hidden directory, force it to the disk, then give it its name."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(partial)): _digest(p) for p in files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for path in [*files, partial / MANIFEST]:
            _sync(path)
        for path in [p for p in partial.rglob("*") if p.is_dir()]:
            _sync(path)
        _sync(partial)
    except OSError:  # where the disk is full, half a directory must not keep it full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        _set_aside(target)
    partial.rename(target)
    _sync(target.parent)


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


@contextlib.contextmanager
def write_errors_are_explained(directory: Path) -> Iterator[None]:
    """Turn a write that failed in the run's directory into what is safe and how to go on."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and str(directory) not in str(error.filename):
            raise
        what = "no space left on the device" if full else "cannot be written to"
        remedy = "Free some space" if full else "Mend that"
        raise FedloraError(
            f"{directory}: {what} ({error.strerror}); every round-N directory there is whole. "
            f"{remedy}, then: fedlora run --resume {directory}"
        ) from None


def _write_config(path: Path, config_yaml: str) -> None:
    path.write_text(config_yaml, encoding="utf-8")
    _sync(path)


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
                _write_config(path / PARTIAL_CONFIG, config_yaml)
                (path / PARTIAL_CONFIG).rename(path / CONFIG)
                _sync(path)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".{path.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                _write_config(partial / CONFIG, config_yaml)
                _sync(partial)
                partial.rename(path)
                _sync(path.parent)
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
        with (self.path / METRICS).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
            out.flush()
            os.fsync(out.fileno())

    def mend_metrics(self) -> None:
        """Cut off a last line that was half written when a run was killed."""
        path = self.path / METRICS
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
            with path.open("r+b") as out:
                out.truncate(content.rfind(b"\n") + 1)

    # --- rounds ---

    def rounds(self) -> list[int]:
        """The rounds on the disk, ascending, whole or damaged."""
        found = (_ROUND.match(p.name) for p in self.path.iterdir() if p.is_dir())
        return sorted(int(match.group(1)) for match in found if match)

    def save_round(
        self,
        delta: Deltas,
        targets: Targets,
        state: ServerState,
        line: Any,
        extra: Any,
        clients: Mapping[int, ClientState] | None = None,
        models: Mapping[int, tuple[Deltas, Mapping[str, Tensor]]] | None = None,
    ) -> Path:
        """Write `round-N/`: the global model as a PEFT directory, and the state to resume from.

        `client-K/` in it are the clients' own models, where they are kept.
        """

        def fill(partial: Path) -> None:
            write_adapter(partial, delta, targets, state.dense)
            for client, (own, dense) in (models or {}).items():
                write_adapter(partial / f"client-{client}", own, targets, dense)
            (partial / "state").mkdir()
            save_tensors(partial / "state" / "server.safetensors", state_to_tensors(state))
            if clients:
                save_tensors(partial / "state" / CLIENTS, clients_to_tensors(clients))
            facts = {
                "round": state.round,
                "ranks": {str(k): v for k, v in state.ranks.items()},
                "last_seen": {str(k): v for k, v in state.last_seen.items()},
                "extra": extra,
                "line": line,
            }
            (partial / "state" / "state.json").write_text(json.dumps(facts) + "\n")

        target = self.path / f"round-{state.round}"
        _place(target, fill)
        return target

    def prune(self, limit: int | None, keep: int | None) -> None:
        """Remove all but the newest `limit` rounds (never fewer than two) and round `keep`."""
        if limit is None:
            return
        for number in self.rounds()[: -max(2, limit)]:
            if number != keep:
                gone = self.path / f".round-{number}.removed"
                shutil.rmtree(gone, ignore_errors=True)  # of a run killed just here
                (self.path / f"round-{number}").rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

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
                _set_aside(self.path / f"round-{number}")
        return None, problems

    # --- the end ---

    def save_final(self, fill: Callable[[Path], None]) -> Path:
        """Write `final/`; its presence says that the run is complete."""
        _place(self.path / FINAL, fill)
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
        how = "" if done else f", or go on with it: fedlora run --resume {path}"
        raise InputError(
            f"output_dir: {path} holds {'a complete' if done else 'another'} run; choose another "
            f"--output_dir{how}"
        )
    if any(p.name not in (LOCK, PARTIAL_CONFIG) for p in path.iterdir()):
        raise InputError(f"output_dir: {path} is not empty; choose another --output_dir")


def verify(path: Path) -> None:
    """Compare every file of a saved directory with its manifest.

    Raises:
        CheckpointError: which file is missing or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: damaged ({MANIFEST} is missing or broken)") from None
    for name, digest in manifest.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: damaged ({name} is missing)")
        if _digest(file) != digest:
            raise CheckpointError(f"{path}: damaged ({name} is not what was written)")


def load_round(path: Path) -> Saved:
    """A saved round, verified.

    Raises:
        CheckpointError: it is damaged.
    """
    verify(path)
    facts = json.loads((path / "state" / "state.json").read_text())
    state = from_copies(
        load_file(path / "state" / "server.safetensors"),
        facts["round"],
        {int(k): v for k, v in facts["last_seen"].items()},
        {int(k): v for k, v in facts["ranks"].items()},
    )
    kept = path / "state" / CLIENTS
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

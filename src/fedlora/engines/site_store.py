"""Keeps on a site's disk what a run needs to go on after the worker was killed.

    RUN/run.json                   the run's id
    RUN/join.bin, agree.bin        the messages by which the site takes part
    RUN/model.safetensors          the global model that the site holds, and its round
    RUN/answer-R-A.bin             what was answered to attempt A of round R
    RUN/state-R-A.safetensors      what the client keeps for itself after that training
    secret                         of the site, see `disguised`

RUN is a digest of the run's id, which comes from outside and is no name for a directory. Every file
is written under a hidden name, forced to the disk and renamed, so that it is whole or absent.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import CheckpointError, FedloraError
from fedlora.federation.codec import DamagedError, pack_file, unpack_file
from fedlora.federation.exchange import Agreement
from fedlora.federation.held_model import HeldModel
from fedlora.federation.messages import ClientState
from fedlora.runs.safe_writing import sync

_MODEL = "model.safetensors"

MOST_RUNS = 8
"""Runs whose directories stay; a new one takes the place of the one that was used longest ago."""

Turn = tuple[int, int]
"""A round and an attempt."""


@dataclass(frozen=True)
class RunStore:
    """The directory of one run.

    Args:
        path: the directory.
        run: the run's id.
    """

    path: Path
    run: str

    @staticmethod
    def of(state_dir: Path, run: str) -> RunStore:
        """The directory of a run, made where it is missing.

        Raises:
            FedloraError: it cannot be made.
        """
        name = hashlib.sha256(run.encode()).hexdigest()[:24]
        store = RunStore(state_dir / name, run)
        try:
            store.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (store.path / "run.json").exists():
                text = json.dumps({"run": run}).encode()
                store._write("run.json", lambda path: _write_bytes(path, text))
            os.utime(store.path)
        except OSError as error:
            raise FedloraError(f"{state_dir}: cannot be written to ({error.strerror})") from None
        _remove_oldest(state_dir)
        return store

    @staticmethod
    def last(state_dir: Path) -> RunStore | None:
        """The directory of the run that was used last; None: there is none."""
        stores = _stores(state_dir)
        return stores[-1] if stores else None

    def remove(self) -> None:
        """Forget the run."""
        shutil.rmtree(self.path, ignore_errors=True)

    # --- the global model ---

    def keep_model(self, model: HeldModel) -> None:
        """Keep the global model that the site holds."""
        tensors, header = model.packed()
        self._write(_MODEL, lambda path: pack_file(path, tensors, header))

    def model(self, agreement: Agreement) -> HeldModel:
        """The global model that was kept; one that holds nothing where it is missing or damaged.

        The server sends all of it then.
        """
        try:
            packet = unpack_file(self.path / _MODEL)
        except (DamagedError, OSError):
            return HeldModel(agreement)
        return HeldModel.unpacked(agreement, packet.tensors, packet.header)

    # --- messages ---

    def keep(self, name: str, message: bytes) -> None:
        """Keep the message `join` or `agree`."""
        self._write(f"{name}.bin", lambda path: _write_bytes(path, message))

    def kept(self, name: str) -> bytes | None:
        """The message that was kept; None: there is none."""
        path = self.path / f"{name}.bin"
        return path.read_bytes() if path.exists() else None

    def forget(self, name: str) -> None:
        """Remove a message."""
        (self.path / f"{name}.bin").unlink(missing_ok=True)

    # --- answers ---

    def answers(self) -> dict[Turn, Path]:
        """Where the kept answers lie."""
        return self._turns("answer")

    def keep_answer(self, turn: Turn, answer: bytes) -> None:
        """Keep an answer in the place of earlier ones."""
        self._write(_name("answer", turn), lambda path: _write_bytes(path, answer))
        for other, path in self.answers().items():
            if other != turn:
                path.unlink()

    def forget_answers(self) -> None:
        """Remove all answers: they are asked anew."""
        for path in self.answers().values():
            path.unlink()

    # --- states ---

    def keep_state(self, turn: Turn, state: ClientState) -> None:
        """Keep what the client has after a training."""
        self._write(_name("state", turn), lambda path: pack_file(path, state.factors, {}))

    def state(self, turn: Turn) -> ClientState | None:
        """What the client had after a training; None: nothing is there.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.path / _name("state", turn)
        if not path.exists():
            return None
        try:
            return ClientState(unpack_file(path).tensors)
        except DamagedError as error:
            raise CheckpointError(str(error)) from None

    def keep_only(self, turn: Turn) -> None:
        """Remove the states of all other trainings: they do not count."""
        for other, path in self._turns("state").items():
            if other != turn:
                path.unlink()

    # --- files ---

    def _turns(self, kind: str) -> dict[Turn, Path]:
        found = ((re.fullmatch(rf"{kind}-(\d+)-(\d+)\.\w+", p.name), p) for p in self._files())
        return {(int(m[1]), int(m[2])): path for m, path in found if m}

    def _files(self) -> list[Path]:
        return sorted(self.path.iterdir())

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file that is whole or absent.

        Raises:
            FedloraError: it cannot be written.
        """
        hidden = self.path / f".{name}.partial"
        try:
            write(hidden)
            sync(hidden)
            hidden.rename(self.path / name)
            sync(self.path)
        except OSError as error:
            hidden.unlink(missing_ok=True)
            raise FedloraError(f"{self.path}: cannot be written to ({error.strerror})") from None


def disguised(state_dir: Path, fingerprint: str) -> str:
    """A fingerprint of rows that the site alone can compute: HMAC-SHA-256 under its secret, in hex.

    A server sees by it that the rows are still the same. Of the plain one it could tell whether
    they are some that it has in mind.

    Raises:
        FedloraError: the secret cannot be read or written.
    """
    path = state_dir / "secret"
    try:
        if not path.exists():
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            hidden = path.with_name(".secret.partial")
            hidden.unlink(missing_ok=True)
            with open(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            sync(hidden)
            hidden.rename(path)
            sync(state_dir)
        secret = path.read_bytes()
    except OSError as error:
        raise FedloraError(f"{path}: cannot be used ({error.strerror})") from None
    return hmac.new(secret, fingerprint.encode(), "sha256").hexdigest()


def _name(kind: str, turn: Turn) -> str:
    ending = "bin" if kind == "answer" else "safetensors"
    return f"{kind}-{turn[0]}-{turn[1]}.{ending}"


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _read_run(path: Path) -> str:
    """The run's id."""
    return str(json.loads((path / "run.json").read_text())["run"])


def _stores(state_dir: Path) -> list[RunStore]:
    """All runs that are kept, the one used last at the end."""
    paths = list(state_dir.glob("*/run.json")) if state_dir.is_dir() else []
    stores = []
    for path in sorted(paths, key=lambda path: path.parent.stat().st_mtime_ns):
        with suppress(OSError, ValueError, KeyError, TypeError):  # what is damaged is no run
            stores.append(RunStore(path.parent, _read_run(path.parent)))
    return stores


def _remove_oldest(state_dir: Path) -> None:
    for store in _stores(state_dir)[:-MOST_RUNS]:
        store.remove()

"""Writes directories that are whole or absent, whatever moment the process is killed at.

A directory is written under a name beginning with a dot and renamed when all of it is on the disk.
`manifest.json` in it holds the SHA-256 of every other file, by which damage is known later.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fedlora.errors import CheckpointError, FedloraError
from fedlora.runs.file_names import MANIFEST


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file and force it to the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def write_directory(target: Path, fill: Callable[[Path], Mapping[str, str] | None]) -> None:
    """Fill a hidden directory, force it to the disk, then give it its name.

    What bears the name already is set aside.

    Args:
        target: the directory to be.
        fill: writes the files into the directory it is given. It may return the SHA-256 of those
            that are known to hold what was written earlier, by their paths in the directory: they
            are not read again.

    Raises:
        OSError: it cannot be written; nothing of it is left, lest half a directory keep a full disk
            full.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_manifest(partial, fill(partial) or {})
        _sync_all(partial)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        set_aside(target)
    partial.rename(target)
    sync(target.parent)


def _write_manifest(directory: Path, known: Mapping[str, str]) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {str(path.relative_to(directory)): path for path in files}
    manifest = {name: known.get(name) or _sha256(path) for name, path in names.items()}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _sync_all(directory: Path) -> None:
    """Force a directory and all that is in it to the disk, the files before the names."""
    inside = list(directory.rglob("*"))
    for path in [p for p in inside if p.is_file()] + [p for p in inside if p.is_dir()]:
        sync(path)
    sync(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(path: Path) -> dict[str, str]:
    """What the files of a saved directory were when it was written: path in it -> SHA-256.

    Raises:
        CheckpointError: the manifest is missing or broken.
    """
    try:
        manifest: dict[str, str] = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: damaged ({MANIFEST} is missing or broken)") from None
    return manifest


def verify(path: Path) -> None:
    """Compare every file of a saved directory with its manifest.

    Raises:
        CheckpointError: which file is missing or damaged.
    """
    for name, digest in read_manifest(path).items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: damaged ({name} is missing)")
        if _sha256(file) != digest:
            raise CheckpointError(f"{path}: damaged ({name} is not what was written)")


def set_aside(path: Path) -> None:
    """Rename a directory to `NAME.damaged`, in the place of one that was set aside before."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def remove_directory(path: Path) -> None:
    """Remove a directory, renamed first, so that its name never stands for half of it."""
    removed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)  # of a process that was killed just here
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


@contextlib.contextmanager
def write_errors_are_explained(directory: Path) -> Iterator[None]:
    """Turn a write that failed in the run's directory into what is safe and how to go on.

    Raises:
        FedloraError: what failed; other errors stay what they are.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and str(directory) not in str(error.filename):
            raise
        problem = "no space left on the device" if full else "cannot be written to"
        remedy = "Free some space" if full else "Mend that"
        raise FedloraError(
            f"{directory}: {problem} ({error.strerror}); every round-N directory there is whole. "
            f"{remedy}, then: fedlora run --resume {directory}"
        ) from None

"""Directories that are whole or absent, and damage that is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fedlora.errors import CheckpointError
from fedlora.runs.file_names import MANIFEST
from fedlora.runs.safe_writing import (
    remove_directory,
    set_aside,
    verify,
    write_directory,
    write_text,
)


def fill(directory: Path) -> None:
    """Two files, one of them in a directory of its own."""
    write_text(directory / "a.txt", "äh")
    (directory / "in").mkdir()
    (directory / "in" / "b.bin").write_bytes(b"\x00\x01")


def test_the_manifest_holds_the_sum_of_every_file(tmp_path: Path) -> None:
    write_directory(tmp_path / "it", fill)
    manifest = json.loads((tmp_path / "it" / MANIFEST).read_text())
    assert manifest == {
        "a.txt": hashlib.sha256("äh".encode()).hexdigest(),
        "in/b.bin": hashlib.sha256(b"\x00\x01").hexdigest(),
    }
    verify(tmp_path / "it")
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda it: (it / "a.txt").write_text("oh"), r"a\.txt is not what was written"),
        (lambda it: (it / "in" / "b.bin").unlink(), r"in/b\.bin is missing"),
        (lambda it: (it / MANIFEST).write_text("{"), r"manifest\.json is missing or broken"),
        (lambda it: (it / MANIFEST).unlink(), r"manifest\.json is missing or broken"),
    ],
)
def test_damage_is_named(damage: object, says: str, tmp_path: Path) -> None:
    write_directory(tmp_path / "it", fill)
    damage(tmp_path / "it")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=f"it: damaged \\({says}\\)"):
        verify(tmp_path / "it")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_directory(tmp_path / "it", fill)

    def fails(directory: Path) -> None:
        fill(directory)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_directory(tmp_path / "it", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    verify(tmp_path / "it")


def test_what_bears_the_name_is_set_aside(tmp_path: Path) -> None:
    for text in ("one", "two", "three"):
        write_directory(tmp_path / "it", lambda it, text=text: write_text(it / "a", text))  # type: ignore[misc]
    assert (tmp_path / "it" / "a").read_text() == "three"
    assert (tmp_path / "it.damaged" / "a").read_text() == "two"
    set_aside(tmp_path / "it")
    assert (tmp_path / "it.damaged" / "a").read_text() == "three"
    remove_directory(tmp_path / "it.damaged")
    assert list(tmp_path.iterdir()) == []

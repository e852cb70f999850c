"""The directory of an export: whole or not at all, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.export.output import check_output, write_whole
from fedlora.errors import CheckpointError, InputError


def fill(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    check_output(target, False, [tmp_path / "run"])
    write_whole(target, fill)
    assert [path.name for path in target.iterdir()] == ["adapter_config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [CheckpointError("no"), KeyboardInterrupt(), OSError(28, "full")])
def test_what_fails_leaves_nothing_and_what_was_there(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "out"
    write_whole(target, fill)
    (target / "mine").write_text("kept")

    def fails(directory: Path) -> None:
        fill(directory)
        raise error

    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_whole(target, fails)
    assert (target / "mine").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write_whole(target, fill)
    with pytest.raises(InputError, match="not empty; choose another directory, or --overwrite"):
        check_output(target, False, [])
    check_output(target, True, [])
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", False, [])


def test_what_is_no_export_is_never_overwritten(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("")
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    fill(run)
    several = tmp_path / "several"
    (several / "one").mkdir(parents=True)
    fill(several)
    for path in (photos, run, several):
        with pytest.raises(InputError, match="holds no export"):
            check_output(path, True, [])
    with pytest.raises(InputError, match="is a file"):
        check_output(photos / "cat.jpg", True, [])


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "run" / "final"
    source.mkdir(parents=True)
    fill(source)
    for path in (source, source.parent, tmp_path):
        with pytest.raises(InputError, match="holds what is exported"):
            check_output(path, True, [source])
    check_output(source / "inside", True, [source])

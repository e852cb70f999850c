"""A run's directory and state: made in one step, never overwritten, read back to the bit."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import FedloraError, InputError
from fedlora.lowrank import Delta, to_dense
from fedlora.methods.values import ServerState
from fedlora.runs.directory import RunDirectory, check_free
from fedlora.runs.safe_writing import write_errors_are_explained
from fedlora.runs.state_file import state_from_tensors, state_to_tensors
from support.checkpoint import TARGETS, a_state, assert_same, low, snapshot


def same(x: Delta, y: Delta) -> bool:
    return type(x) is type(y) and torch.equal(to_dense(x), to_dense(y))


def test_state_survives_its_tensors() -> None:
    state = a_state()
    back = state_from_tensors(state_to_tensors(state), state.round, state.last_seen, state.ranks)
    assert_same(state, back)
    for group in ("adapter", "base_delta", "last_merge"):
        one, other = getattr(state, group), getattr(back, group)
        assert one.keys() == other.keys()
        assert all(same(one[k], other[k]) for k in one)
    assert torch.equal(back.momentum.factors["b.up/A"], state.momentum.factors["b.up/A"])
    assert same(back.momentum.products["b.up"], state.momentum.products["b.up"])
    assert torch.equal(back.dense["head.weight"], state.dense["head.weight"])


def test_no_two_tensors_of_a_state_share_memory() -> None:
    """safetensors refuses those that do; after FLoRA's round, merge and momentum are the same."""
    tensors = [t for t in state_to_tensors(a_state()).values() if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_an_empty_state_survives_its_tensors() -> None:
    state = ServerState(round=0, adapter={}, base_delta={})
    assert_same(state, state_from_tensors(state_to_tensors(state), 0, {}, {}))


def test_directory_and_configuration_appear_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, rename = list[tuple[bool, str]](), Path.rename

    def watch(self: Path, target: Path) -> Path:
        seen.append((Path(target).exists(), (self / "config.yaml").read_text()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    RunDirectory.create(tmp_path / "deep" / "er" / "out", "seed: 1\n")
    assert seen == [(False, "seed: 1\n")]
    assert (tmp_path / "deep" / "er" / "out" / "config.yaml").read_text() == "seed: 1\n"
    assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["out"]


def test_an_empty_directory_is_used_and_kept(tmp_path: Path) -> None:
    """It may be a mount point, a link or somebody's working directory."""
    empty = tmp_path / "empty"
    empty.mkdir()
    before = empty.stat().st_ino
    RunDirectory.create(empty, "seed: 1\n")
    assert empty.stat().st_ino == before
    assert sorted(p.name for p in empty.iterdir()) == [".lock", "config.yaml"]


def test_a_link_to_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    RunDirectory.create(tmp_path / "link", "seed: 1\n")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.yaml").exists()


def test_the_working_directory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory.create(".", "seed: 1\n")
    assert Path("config.yaml").read_text() == "seed: 1\n"


def test_what_a_killed_start_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "config.yaml").write_text("se")
    RunDirectory.create(tmp_path / "out", "seed: 1\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".config.yaml.partial").write_text("se")
    RunDirectory.create(empty, "seed: 1\n")
    for name in ("out", "empty"):
        assert (tmp_path / name / "config.yaml").read_text() == "seed: 1\n"
    assert sorted(p.name for p in tmp_path.rglob("*partial")) == []


def another_run(path: Path) -> None:
    RunDirectory.create(path, "seed: 9\n").close()


def complete_run(path: Path) -> None:
    run = RunDirectory.create(path, "seed: 9\n")
    run.save_final(lambda partial: None)
    run.close()


def other_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


OCCUPIED: list[tuple[Callable[[Path], Any], str]] = [
    (another_run, r"holds another run; .*go on with it: fedlora run --resume"),
    (complete_run, r"holds a complete run; choose another --output_dir$"),
    (other_files, r"is not empty; choose another"),
    (lambda path: path.write_text("a file"), r"is a file"),
]


@pytest.mark.parametrize(("occupy", "message"), OCCUPIED, ids=["run", "complete", "files", "file"])
def test_an_occupied_directory_is_refused_and_untouched(
    tmp_path: Path, occupy: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / "out"
    occupy(path)
    before = snapshot(tmp_path)
    for refuse in (check_free, lambda p: RunDirectory.create(p, "seed: 1\n")):
        with pytest.raises(InputError, match=message) as raised:
            refuse(path)
        assert str(path) in str(raised.value)
    assert snapshot(tmp_path) == before


def test_a_directory_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"output_dir: .*file/out: cannot be made"):
        RunDirectory.create(tmp_path / "file" / "out", "")


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        with pytest.raises(InputError, match=f"{name}: nothing to resume; there is no config.yaml"):
            RunDirectory.open(tmp_path / name)
    complete_run(tmp_path / "done")
    with pytest.raises(InputError, match=r"done: nothing to resume; the run is complete"):
        RunDirectory.open(tmp_path / "done")
    assert not (tmp_path / "empty" / ".lock").exists()


def test_equal_rounds_are_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "other"):
        run = RunDirectory.create(tmp_path / name, "")
        torch.manual_seed(0)
        contents.append(snapshot(run.save_round({"b.up": low()}, TARGETS, a_state(), {}, {})))
    assert contents[0] == contents[1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_write_errors_are_explained(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(FedloraError, match=f"{tmp_path}: no space left .* --resume {tmp_path}$"),
        write_errors_are_explained(tmp_path),
    ):
        raise OSError(number, "full")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), write_errors_are_explained(tmp_path):
        raise BrokenPipeError(errno.EPIPE, "pipe")

"""A state saved as what its rounds have changed: read back to the bit, whole by itself."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fedlora.errors import CheckpointError
from fedlora.lowrank import Dense, LowRank
from fedlora.runs import saved_state
from fedlora.runs.saved_state import chain_in
from fedlora.runs.state_file import settled, state_to_tensors
from support.checkpoint import assert_same
from support.saved_states import read, save, states


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_changes_are_written_once_and_linked(tmp_path: Path) -> None:
    for state in states("exact", 4):
        save(tmp_path, state)
    changes = [f"change-{number}.safetensors" for number in (2, 3, 4)]
    assert names(tmp_path / "1") == ["server.safetensors"]
    assert names(tmp_path / "4") == [*changes, "server-1.safetensors", "server.safetensors"]
    assert os.path.samefile(tmp_path / "4" / changes[0], tmp_path / "2" / changes[0])
    first = tmp_path / "1" / "server.safetensors"
    assert os.path.samefile(tmp_path / "4" / "server-1.safetensors", first)
    groups = {name.partition("/")[0] for name in load_file(tmp_path / "4" / "server.safetensors")}
    assert groups == {"changes", "sketch"}
    new = [(tmp_path / "4" / name).stat().st_size for name in (changes[-1], "server.safetensors")]
    whole = sum(value.nbytes for value in state_to_tensors(state).values())
    assert sum(new) < whole / 3


def test_a_round_is_whole_without_those_before_it(tmp_path: Path) -> None:
    for state in states("exact", 4):
        save(tmp_path, state)
    copied = shutil.copytree(tmp_path / "4", tmp_path / "copied")
    for number in range(1, 4):
        shutil.rmtree(tmp_path / str(number))
    assert_same(read(tmp_path / "4", state), state)
    assert_same(read(copied, state), state)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV])
def test_files_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(file: Path, name: Path) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "link", refused)
    for state in states("flora", 3):
        assert_same(read(save(tmp_path, state), state), state)
    assert (tmp_path / "3" / "server-1.safetensors").stat().st_nlink == 1


def test_it_is_written_whole_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_state, "_MOST_CHANGES", 2)
    whole = []
    for state in states("exact", 8):
        directory = save(tmp_path, state)
        assert_same(read(directory, state), state)
        whole += [state.round] if names(directory) == ["server.safetensors"] else []
    assert whole == [1, 4, 7]


def test_changes_as_large_as_the_whole_begin_a_new_one(tmp_path: Path) -> None:
    for state in states("exact", 5):
        save(tmp_path, state)
    assert names(tmp_path / "5") == ["server.safetensors"]
    size = [sum(f.stat().st_size for f in (tmp_path / "4").glob("change-*"))]
    assert size[0] >= (tmp_path / "1" / "server.safetensors").stat().st_size


def test_factors_become_a_matrix_on_the_way(tmp_path: Path) -> None:
    kinds = set()
    for state in states("exact", 4):
        found = read(save(tmp_path, state), state)
        assert_same(found, state)
        kinds.add(type(found.adapter["up"]))
    assert names(tmp_path / "4") != ["server.safetensors"]
    assert kinds == {LowRank, Dense}


def test_rounded_messages(tmp_path: Path) -> None:
    for state in states("exact", 4, compression="bf16"):
        assert_same(read(save(tmp_path, state), state), state)


def test_a_missing_link_is_followed_by_a_whole_state(tmp_path: Path) -> None:
    *earlier, state = states("exact", 4)
    for saved in earlier:
        save(tmp_path, saved)
    (tmp_path / "3" / "change-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="files of earlier rounds are missing"):
        read(tmp_path / "3", earlier[-1])
    directory = save(tmp_path, state)
    assert names(directory) == ["server.safetensors"]
    assert_same(read(directory, state), state)


def test_a_state_of_an_earlier_version_is_gone_on_from_whole(tmp_path: Path) -> None:
    """Without leading directions in it, those of the next round cannot be computed from it."""
    for state in states("exact", 3):
        if state.round == 2:
            path = tmp_path / "1" / "server.safetensors"
            kept = {k: v for k, v in load_file(path).items() if not k.startswith("leading/")}
            save_file(kept, path)
        save(tmp_path, state)
    assert names(tmp_path / "2") == ["server.safetensors"]
    assert names(tmp_path / "3") == [
        "change-3.safetensors",
        "server-2.safetensors",
        "server.safetensors",
    ]


@pytest.mark.parametrize("lacks", ["a module", "the change", "an earlier module"])
def test_a_change_that_is_not_all_is_followed_by_a_whole_state(tmp_path: Path, lacks: str) -> None:
    for state in states("exact", 3, clients_per_round=2):
        if state.round == 3:
            changes = dict(state.changes)
            if lacks == "the change":
                del changes[3]
            else:
                number = 3 if lacks == "a module" else 2
                increments = {"up": changes[number].increments["up"]}
                changes[number] = replace(changes[number], increments=increments)
            state = settled(replace(state, changes=changes))
        directory = save(tmp_path, state)
    assert names(directory) == ["server.safetensors"]
    assert_same(read(directory, state), state)


def test_another_outcome_than_what_was_saved_is_refused(tmp_path: Path) -> None:
    for state in states("exact", 2):
        directory = save(tmp_path, state)
    path = directory / "change-2.safetensors"
    tensors = load_file(path)
    tensors["increments/2/up/B"] *= 1.01
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="do not come to the model that was saved"):
        read(directory, state)


def test_what_a_state_rests_on(tmp_path: Path) -> None:
    assert chain_in(tmp_path / "absent", 1) is None
    for state in states("flora", 2):
        directory = save(tmp_path, state)
    chain = chain_in(directory, 2)
    assert chain is not None
    assert (chain.start, list(chain.changes)) == (1, [2])
    assert list(chain.links) == ["server-1.safetensors", "change-2.safetensors"]

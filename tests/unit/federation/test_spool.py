"""Updates that arrive in any order are handed on in client order, from memory or the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.federation.codec import DamagedError
from fedlora.federation.messages import ClientUpdate
from fedlora.federation.spool import ReorderBuffer, canonical_layout
from fedlora.lowrank import LowRank


def update(client: int) -> ClientUpdate:
    """An update that can be told from others."""
    value = float(client)
    x = LowRank(torch.full((2, 3), value), torch.full((4, 2), value, dtype=torch.bfloat16).float())
    return ClientUpdate(client, 1, {"q": x}, 10 + client, {"head": torch.tensor([value])})


def clients(updates: object) -> list[int]:
    """Whose updates these are, each with its own values."""
    out = []
    for it in updates:  # type: ignore[attr-defined]
        assert float(it.adapter["q"].A[0, 0]) == float(it.dense["head"]) == it.client
        assert it.num_examples == 10 + it.client
        out.append(it.client)
    return out


@pytest.mark.parametrize("on_disk", [False, True])
def test_updates_are_handed_on_as_soon_as_lower_clients_are_done(
    on_disk: bool, tmp_path: Path
) -> None:
    spool = tmp_path / "spool" if on_disk else None
    buffer = ReorderBuffer(spool)
    buffer.open([5, 1, 3, 7])
    buffer.put(update(3))
    assert 3 in buffer
    assert clients(buffer.ready()) == []
    buffer.put(update(1))
    assert clients(buffer.ready()) == [1, 3]
    buffer.put(update(7))
    buffer.skip(5)
    assert clients(buffer.ready()) == [7]
    if spool is not None:
        assert list(spool.iterdir()) == []


def test_at_the_end_nobody_is_waited_for() -> None:
    buffer = ReorderBuffer()
    buffer.open(range(5))
    for client in (4, 2):
        buffer.put(update(client))
    buffer.skip(4)
    assert clients(buffer.rest()) == [2]


def test_the_next_in_turn_never_goes_to_the_disk(tmp_path: Path) -> None:
    buffer = ReorderBuffer(tmp_path / "spool")
    buffer.open([0, 1, 2])
    buffer.put(update(0))
    assert not (tmp_path / "spool").exists()
    buffer.put(update(2))
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["client-2.safetensors"]
    buffer.skip(2)
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_round_begins_without_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / "client-9.safetensors").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("mine")
    ReorderBuffer(tmp_path).open([0])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_that_was_damaged_is_no_update(tmp_path: Path) -> None:
    buffer = ReorderBuffer(tmp_path)
    buffer.open([0, 1])
    buffer.put(update(1))
    path = tmp_path / "client-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=r"client-1\.safetensors: "):
        list(buffer.rest())


def test_the_layout_is_that_of_new_tensors() -> None:
    turned = LowRank(torch.ones(3, 2).T, torch.ones(2, 4).T)
    laid_out = canonical_layout(ClientUpdate(0, 1, {"q": turned}, 1)).adapter["q"]
    assert laid_out.A.is_contiguous()
    assert laid_out.B.is_contiguous()

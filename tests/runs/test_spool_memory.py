"""Updates are folded as they come and let go: what waits, where, and that it changes no bit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.federation.server import Server
from fedlora.federation.spool import ReorderBuffer, canonical_layout
from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from support.products import in_turn
from support.simulated import SHAPES, random_adapter, ranks_for, serve, train
from support.spool import assert_same, tensors, with_spool


@contextmanager
def counting_tensors() -> Iterator[Callable[[], int]]:
    """Gives what counts the bytes of the tensors that are alive and were made since."""

    def count() -> int:
        gc.collect()
        alive = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor]
        return sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())

    gc.collect()
    gc.freeze()  # what is frozen is neither collected nor listed
    try:
        yield count
    finally:
        gc.unfreeze()


def answers(server: Server, sent: Mapping[int, Broadcast]) -> Callable[[int], ClientUpdate]:
    """Gives a client's update: that of client 0, in memory of its own."""
    trained = train(server, sent[0])

    def answer(client: int) -> ClientUpdate:
        adapter = {n: LowRank(x.A.clone(), x.B.clone()) for n, x in trained.adapter.items()}
        return replace(trained, client=client, adapter=adapter)

    return answer


def held_after_all(method: str, clients: int, spool: Path | None, backwards: bool) -> int:
    """Bytes that a server holds when all but the lowest client have answered."""
    server = with_spool(serve(method, [2] * clients, num_examples=[5] * clients), spool)
    with counting_tensors() as count:
        sent = server.plan()
        answer = answers(server, sent)
        order = reversed(sent) if backwards else iter(sent)
        for k in order:
            if not (backwards and k == 0):
                server.accept(answer(k))
        del sent, answer
        return count()


FEW, MANY = 20, 80
"""Clients."""


@pytest.mark.slow
@pytest.mark.parametrize("method", in_turn(METHODS, 0))
def test_memory_does_not_grow_with_the_clients(method: str, tmp_path: Path) -> None:
    for spool, backwards in ((None, False), (tmp_path, True)):
        few, many = (held_after_all(method, k, spool, backwards) for k in (FEW, MANY))
        # A sum may hold factors as large as its matrices before it goes over to those.
        matrices = 2 * 8 * sum(m * n for m, n in SHAPES.values())
        update = 2 * 8 * sum(m + n for m, n in SHAPES.values())
        assert matrices < 30 * update
        assert many <= few + matrices, "60 clients more, and memory for more than 30 of them"


def test_without_a_spool_what_comes_early_waits_in_memory() -> None:
    few, many = (held_after_all("exact", k, None, True) for k in (FEW, MANY))
    assert many > 3 * few


@pytest.mark.parametrize("method", METHODS)
def test_clients_of_one_rank_are_sent_the_same_tensors(method: str) -> None:
    ranks = ranks_for(METHODS[method]) * 5
    server = serve(method, ranks, given=random_adapter(4, 3))
    sent = server.plan()
    for k, broadcast in sent.items():
        same = sent[k % 4]
        assert broadcast.adapter is same.adapter
        assert broadcast.leading is same.leading


def test_only_what_cannot_be_folded_is_written(tmp_path: Path) -> None:
    spool = tmp_path / "spool"

    def files() -> list[str]:
        return sorted(p.name for p in spool.iterdir()) if spool.is_dir() else []

    server = with_spool(serve("exact"), spool)
    sent = server.plan()
    updates = {k: train(server, b) for k, b in sent.items()}
    server.accept(updates[0])
    server.accept(updates[1])
    assert not spool.exists()
    server.accept(updates[3])
    assert files() == ["client-3.safetensors"]
    server.accept(updates[2])
    assert files() == ["client-3.safetensors"]
    server.commit()
    assert files() == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "client-7.safetensors").write_bytes(b"half")
    (tmp_path / "somebody's.txt").write_text("kept")
    with_spool(serve("exact"), tmp_path).plan()
    assert [p.name for p in tmp_path.iterdir()] == ["somebody's.txt"]


@pytest.mark.parametrize("spooled", [False, True])
def test_an_update_can_be_taken_back_until_it_is_folded(spooled: bool, tmp_path: Path) -> None:
    with_it, without = (
        with_spool(serve("exact"), tmp_path / "s" if spooled else None),
        serve("exact"),
    )
    sent = with_it.plan()
    without.plan()
    updates: Mapping[int, ClientUpdate] = {k: train(with_it, b) for k, b in sent.items()}
    for k in (0, 2, 3):
        with_it.accept(updates[k])
    with_it.reject(2, "failed afterwards")
    with pytest.raises(ValueError, match="client 0 has been counted already"):
        with_it.reject(0, "too late")
    with_it.accept(updates[1])
    for k in (0, 1, 3):
        without.accept(updates[k])
    without.reject(2, "failed afterwards")
    with_it.commit()
    without.commit()
    assert_same(with_it.state, without.state)
    assert not [*tmp_path.rglob("*.safetensors")]


def test_an_update_comes_back_from_the_disk_as_it_went(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    update = ClientUpdate(
        client=3,
        round=1,
        adapter={
            "z": LowRank(whole[:2], whole.T[:5, 1:3]),
            "a.b": LowRank(whole[:1], whole[:, :1]),
        },
        num_examples=7,
        dense={"head": torch.tensor(2.0, dtype=torch.float64), "none": torch.zeros(0, 3)},
        metrics={"loss": 1.5},
        sends="B",
    )
    buffer = ReorderBuffer(tmp_path / "spool")
    buffer.open([1, 3])
    buffer.put(update)
    assert 3 in buffer
    assert not list(buffer.ready())
    (back,) = buffer.rest()
    assert 3 not in buffer
    sent = {n: LowRank(torch.zeros_like(x.A), x.B) for n, x in update.adapter.items()}
    wanted = canonical_layout(replace(update, adapter=sent))
    assert list(back.adapter) == ["z", "a.b"]
    assert list(back.dense) == ["head", "none"]
    for mine, theirs in (
        *((x, tensors(wanted.adapter)[n]) for n, x in tensors(back.adapter).items()),
        *((t, wanted.dense[n]) for n, t in back.dense.items()),
    ):
        assert torch.equal(mine, theirs)
        assert (mine.dtype, mine.stride()) == (theirs.dtype, theirs.stride())
    assert replace(back, adapter={}, dense={}) == replace(update, adapter={}, dense={})


def test_a_spool_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    sent: Broadcast
    server = with_spool(serve("exact"), tmp_path / "spool")
    sent = server.plan()[2]
    (tmp_path / "spool" / "client-2.safetensors").mkdir(parents=True)
    with pytest.raises((FedloraError, OSError), match="client-2"):
        server.accept(train(server, sent))

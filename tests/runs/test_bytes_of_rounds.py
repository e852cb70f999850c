"""The bytes of whole rounds of every rule are those of the buffers that travel."""

from __future__ import annotations

import pytest
import torch

from fedlora.federation.codec import pack, unpack
from fedlora.federation.messages import adapter_of
from fedlora.methods import METHODS
from support.simulated import SHAPES, random_adapter, ranks_for, serve, train


def buffer_bytes(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("method", METHODS)
def test_bytes_up_are_those_of_the_packed_buffer(method: str) -> None:
    server = serve(
        method, ranks_for(METHODS[method]), dense={"head": torch.zeros(7)}, dtype=torch.float32
    )
    for _ in range(2):
        for sent in server.plan().values():
            update = train(server, sent, dtype=torch.float32)
            data = pack(update.tensors, {})
            assert buffer_bytes(data) == update.nbytes
            asked = {name: SHAPES[name] for name in update.adapter}
            back = adapter_of(unpack(data).tensors, asked)
            for name, x in update.adapter.items():
                assert torch.equal(back[name].A, x.A)  # zeros of what does not travel
                assert torch.equal(back[name].B, x.B)
            server.accept(update)
        assert [c.bytes_up for c in server.commit().clients] == [buffer_bytes(data)] * 4 or (
            METHODS[method].mixed_ranks
        )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_down_are_those_of_the_packed_buffer(method: str, given: bool) -> None:
    ranks = ranks_for(METHODS[method])
    adapter = random_adapter(max(ranks), 2) if given else None
    server = serve(method, ranks, adapter, dense={"head": torch.zeros(7)}, clients_per_round=2)
    for _ in range(4):
        for client, sent in server.plan().items():
            last = server.state.last_seen.get(client)
            lacking = server.lacking(client, None if last is None else last - 1)
            assert buffer_bytes(pack(lacking.tensors, {})) == lacking.nbytes == sent.nbytes
            server.accept(train(server, sent))
        server.commit()

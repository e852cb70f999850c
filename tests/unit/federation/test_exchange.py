"""What both sides make of a message by themselves: starts, views, encoded updates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedlora.federation.exchange import (
    Agreement,
    client_start,
    encode_update,
    global_delta,
    server_view,
)
from fedlora.federation.messages import ClientState
from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from fedlora.methods.values import DENSE
from fedlora.seeds import Purpose, fresh_factors
from support.simulated import SHAPES, matrices, serve, train


def agreement(method: str = "exact", seed: int = 5) -> Agreement:
    """An agreement about the simulated shapes."""
    return Agreement(METHODS[method], METHODS[method].options(), SHAPES, seed)


def test_the_digest_tells_agreements_apart_and_nothing_else() -> None:
    one = agreement()
    turned = replace(one, shapes=dict(reversed(SHAPES.items())))
    assert one.digest == turned.digest
    others = [agreement("flora"), agreement(seed=6), replace(one, shapes={"attn": (12, 9)})]
    assert len({one.digest, *(other.digest for other in others)}) == 4


def test_draws_are_those_of_their_purpose() -> None:
    one = agreement()
    drawn = fresh_factors(5, 3, 2, Purpose.CLIENT_INIT, SHAPES)("gate", 4)
    assert torch.equal(one.client_factors(3, 2)("gate", 4), drawn)
    assert not torch.equal(one.client_factors(3, 1)("gate", 4), drawn)


@pytest.mark.parametrize("method", ["exact", "fedit", "flora", "fedex", "hetlora"])
def test_a_start_is_the_global_model_whatever_is_trained(method: str) -> None:
    """Two clients of one federation, one of them training a single module."""
    server = serve(method, modules={1: frozenset({"gate"})})
    sent = server.plan()
    for client in (0, 1):
        start = client_start(sent[client], server.agreement)
        model = {name: matrices({name: x}).get(name) for name, x in start.frozen.items()}
        assert start.adapter.keys() == (SHAPES.keys() if client == 0 else {"gate"})
        whole = matrices(global_delta(server.state))
        began = matrices(start.adapter)
        for name in SHAPES:
            frozen = model.get(name, torch.zeros(()))
            base = matrices(sent[client].base_delta)[name]
            torch.testing.assert_close(base + frozen + began[name], whole[name])


def test_factors_that_a_client_keeps_take_the_place_of_those_sent() -> None:
    server = serve("fedsa")
    sent = server.plan()[0]
    own = torch.ones(12, sent.rank)
    start = client_start(sent, server.agreement, ClientState({"attn.B": own}))
    assert torch.equal(start.adapter["attn"].B, own)
    assert torch.equal(start.adapter["gate"].B, sent.leading["gate"].B[:, : sent.rank])


def test_the_server_sees_what_is_not_sent_as_it_began() -> None:
    server = serve("exact")
    sent = server.plan()[0]
    update, start = train(server, sent), client_start(sent, server.agreement)
    moved = update.adapter["attn"]
    seen = server_view(replace(update, sends="A"), start)["attn"]
    assert torch.equal(seen.A, moved.A)
    assert torch.equal(seen.B, start.adapter["attn"].B)


def test_parameters_trained_whole_are_encoded_as_their_change() -> None:
    server = serve("exact", dense={"head": torch.tensor([1.0, 2.0], dtype=torch.float16)})
    sent = server.plan()[0]
    update = replace(train(server, sent), dense={"head": torch.tensor([1.5, 2.0])})
    encoded = encode_update(update, client_start(sent, server.agreement), sent, server.agreement)
    assert encoded.factors[f"{DENSE}head"].tolist() == [0.5, 0.0]
    assert isinstance(encoded.products["attn"], LowRank)

"""An adapter layer: what is frozen, what each client trains, and the tail of HetLoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlora.lowrank import Dense, LowRank
from fedlora.model.client_rows import ClientRows, RowLayout, spans_of
from fedlora.model.lora_layer import AdapterLayer, ClientAdapter, ClientTerm
from support.adapters import random_lowrank
from support.simulated import matrix

X = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(1))


def layer(dtype: torch.dtype = torch.float32) -> AdapterLayer:
    """Over a linear layer of 5 inputs and 4 outputs."""
    torch.manual_seed(0)
    out = AdapterLayer(nn.Linear(5, 4).to(dtype), ClientRows())
    out.layouts = {3: RowLayout(1)}
    return out


def test_each_clients_tokens_see_its_adapter_alone() -> None:
    it = layer()
    updates = [random_lowrank((4, 5), rank, rank) for rank in (2, 3)]
    private = random_lowrank((4, 5), 1, 9)
    it.load_clients(
        "q",
        [
            ClientAdapter({"q": updates[0]}, {"q": private}, scale=2.0),
            ClientAdapter({"q": updates[1]}),
        ],
    )
    with it.client_rows.divided(tokens=spans_of([3, 4])):
        out = it(X)
    weight = it.weight.double()
    for tokens, change in (
        (slice(0, 3), matrix(updates[0]) + matrix(private)),
        (slice(3, 7), matrix(updates[1])),
    ):
        wanted = X[:, tokens].double() @ (weight + change).T + it.base.bias.double()
        torch.testing.assert_close(out[:, tokens].double(), wanted, rtol=1e-4, atol=1e-5)


def test_what_lies_frozen_is_merged_into_a_copy_and_nothing_is_done_twice() -> None:
    it = layer()
    pristine = it.weight.clone()
    parts = [random_lowrank((4, 5), 2, 0), Dense(torch.ones(4, 5))]
    it.freeze(parts)
    merged = it.merged
    assert merged is not None
    torch.testing.assert_close(merged, pristine + matrix(parts[0]).float() + 1)
    it.freeze(list(parts))
    assert it.merged is merged
    assert torch.equal(it.weight, pristine)
    it.freeze([])
    assert it.merged is None


def test_what_is_merged_for_others_is_what_they_would_merge_themselves() -> None:
    it, parts = layer(), [random_lowrank((4, 5), 2, 0), Dense(torch.ones(4, 5))]
    it.share()
    it.merge_for_others(parts)
    assert it.merged is None  # nothing is loaded here
    it.adopt(parts)
    assert it.merged is it.place
    it.freeze(list(parts))  # the same updates: nothing is merged anew
    assert it.merged is it.place
    alone = layer()
    alone.freeze(parts)
    assert it.merged is not None
    assert alone.merged is not None
    assert torch.equal(it.merged, alone.merged)
    it.freeze([parts[0]])  # others are merged beside the place, which other processes read
    assert it.merged is not it.place
    it.adopt([])
    assert it.merged is None


def test_what_is_not_merged_is_not_shared_either() -> None:
    half, parts = layer(torch.bfloat16), [random_lowrank((4, 5), 2, 0)]
    half.share()
    assert half.place is None
    half.merge_for_others(parts)
    half.adopt(parts)
    assert isinstance(half.branch, LowRank)


def test_beside_half_precision_what_is_frozen_is_a_branch() -> None:
    it = layer(torch.bfloat16)
    it.freeze([random_lowrank((4, 5), 2, 0)])
    assert it.merged is None
    assert isinstance(it.branch, LowRank)
    assert it.branch.A.dtype == torch.bfloat16


def test_what_was_not_trained_comes_back_to_the_bit() -> None:
    update = random_lowrank((4, 5), 4, 0)
    term = ClientTerm(update, None, ClientAdapter({}, scale=0.3), torch.zeros(4, 5))
    back = term.read()
    assert back is not None
    assert torch.equal(back.A, update.A)
    assert torch.equal(back.B, update.B)
    assert term.B is not None
    with torch.no_grad():
        term.B += 1.0
    moved = term.read()
    assert moved is not None
    torch.testing.assert_close(moved.B, update.B + 0.3)


def test_the_tail_is_that_of_the_last_directions() -> None:
    update = random_lowrank((4, 5), 4, 0)
    term = ClientTerm(update, None, ClientAdapter({}, scale=2.0), torch.zeros(4, 5))
    tail = term.tail(0.6)  # 2.4 directions, rounded down
    assert tail is not None
    assert float(tail.detach()) == pytest.approx(
        float(update.B[:, 2:].norm() * update.A[2:].norm()), rel=1e-5
    )
    nothing = ClientTerm(None, None, ClientAdapter({}), torch.zeros(4, 5))
    assert nothing.tail(0.5) is None
    assert nothing.read() is None


def test_factors_that_are_not_trained_require_no_gradient() -> None:
    it = layer()
    it.load_clients("q", [ClientAdapter({"q": random_lowrank((4, 5), 2, 0)}, trains="B")])
    assert it.A is not None
    assert it.B is not None
    assert (it.A.requires_grad, it.B.requires_grad) == (False, True)
    it.load_clients("other", [ClientAdapter({"q": random_lowrank((4, 5), 2, 0)})])
    assert it.A is None

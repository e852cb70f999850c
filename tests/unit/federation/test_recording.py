"""What a committed round was: its clients, their weights and bytes, its change."""

from __future__ import annotations

import pytest
import torch

from fedlora.federation.messages import ClientUpdate
from fedlora.federation.recording import (
    Answer,
    Rejection,
    answer_of,
    client_records,
    global_rank,
    round_record,
)
from fedlora.lowrank import Dense, LowRank, zeros
from fedlora.methods.values import ServerState
from support.simulated import serve


def test_of_an_update_numbers_are_remembered() -> None:
    x = LowRank(torch.zeros(2, 3), torch.zeros(4, 2))
    update = ClientUpdate(0, 1, {"q": x}, 7, metrics={"loss": 0.5}, sends="B")
    assert answer_of(update) == Answer(7, 2, 4 * 2 * 4, {"loss": 0.5})
    assert answer_of(ClientUpdate(0, 1, {}, 7)).rank is None


def test_every_client_that_was_asked_has_a_record() -> None:
    server = serve("exact", (4, 2, 2))
    sent = server.plan()
    answers = {2: Answer(30, 2, 100, {"loss": 1.0}), 0: Answer(10, 4, 200, {})}
    records = client_records(
        server.federation, sent, answers, {0: Rejection("NaN")}, total_weight=30.0
    )
    assert [(r.client, r.rank, r.num_examples, r.weight) for r in records] == [
        (0, 4, 10, 0.0),
        (1, 2, 17, 0.0),  # it never answered
        (2, 2, 30, 1.0),
    ]
    assert [(r.bytes_up, r.rejected) for r in records] == [(200, "NaN"), (0, ""), (100, "")]
    assert [r.outcome for r in records] == ["failed", "failed", "counted"]
    assert all(r.bytes_down == sent[r.client].nbytes for r in records)


def test_the_error_is_that_of_the_change_and_has_no_meaning_with_a_server_optimiser() -> None:
    one = LowRank(torch.ones(1, 3), torch.ones(4, 1))
    half = LowRank(torch.ones(1, 3), torch.full((4, 1), 0.5))
    before, after = ServerState(0, {}), ServerState(1, {"attn": half})
    plain = round_record(serve("exact").federation, before, after, {"attn": one}, (), 0.25)
    assert plain.aggregation_error == pytest.approx(0.5)
    assert plain.update_norm == pytest.approx(0.5 * 12**0.5)
    assert plain.layers["attn"].error == pytest.approx(0.5)
    assert (plain.round, plain.truncation_error, plain.global_rank) == (1, 0.25, 1)
    stepped = serve("exact", server_momentum=0.9).federation
    assert round_record(stepped, before, after, {"attn": one}, (), 0.0).aggregation_error is None
    assert round_record(stepped, before, before, {}, (), 0.0).layers == {}


def test_the_global_rank_is_a_bound_that_no_matrix_exceeds() -> None:
    state = ServerState(
        1,
        {"a": zeros((9, 7), 2), "b": zeros((9, 3), 2)},
        {"a": zeros((9, 7), 3), "b": zeros((9, 3), 3)},
    )
    assert global_rank(state) == 5
    assert global_rank(ServerState(1, {"a": Dense(torch.zeros(9, 7))})) == 7
    assert global_rank(ServerState(0, {})) == 0

"""The federated round as a state machine: whom it asks, what it takes, how it weighs and steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.federation import Federation, Server, client_start, global_delta, initial_state
from fedlora.lowrank import Adapter, Deltas, Dense, LowRank, nbytes
from fedlora.methods import METHODS
from fedlora.state import Broadcast, ClientUpdate, RoundRecord, ServerState

law = settings(max_examples=60, deadline=None, derandomize=True)

# Factors of `up` are larger than its matrix beyond rank 4, of `down` not up to rank 15.
SHAPES = {"down": (30, 30), "up": (8, 10)}
ROWS = (40, 10, 25, 5)
F64 = torch.float64

Matrices = dict[str, Tensor]


def matrices(deltas: Deltas) -> Matrices:
    """Every module's matrix in float64, zero where it is not named."""
    out = {name: torch.zeros(shape, dtype=F64) for name, shape in SHAPES.items()}
    for name, x in deltas.items():
        out[name] = x.W.double() if isinstance(x, Dense) else x.B.double() @ x.A.double()
    return out


def combine(*terms: tuple[float, Matrices]) -> Matrices:
    return {name: sum(w * term[name] for w, term in terms) for name in SHAPES}


def size(values: Matrices) -> float:
    return float(torch.stack([v.norm() for v in values.values()]).norm())


def distance(x: Matrices, y: Matrices) -> float:
    return size(combine((1.0, x), (-1.0, y)))


def model(server: Server) -> Matrices:
    return matrices(global_delta(server.state))


def random_adapter(rank: int, seed: int, dtype: torch.dtype = F64) -> dict[str, LowRank]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            torch.randn(rank, n, generator=g, dtype=dtype),
            torch.randn(m, rank, generator=g, dtype=dtype),
        )
        for name, (m, n) in SHAPES.items()
    }


def serve(
    method: str,
    ranks: Sequence[int] = (3, 3, 3, 3),
    *,
    given: Adapter | None = None,
    dense: Mapping[str, Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    **how: Any,
) -> Server:
    rule = METHODS[method]
    how.setdefault("num_examples", ROWS[: len(ranks)])
    federation = Federation(ranks=ranks, shapes=SHAPES, **how)
    state = initial_state(federation, rule, given, dense)
    return Server(federation, rule, rule.options(**(options or {})), state)


def train(server: Server, sent: Broadcast, seed: int = 0) -> ClientUpdate:
    """A float64 update: the client's start, moved by a random step."""
    start = client_start(sent, server.rule, server.options, SHAPES, server.federation.seed)
    step = random_adapter(sent.rank, 997 * seed + 31 * sent.round + sent.client)
    return ClientUpdate(
        sent.client,
        sent.round,
        {
            name: LowRank(x.A + 0.3 * step[name].A, x.B + 0.3 * step[name].B)
            for name, x in start.adapter.items()
        },
        server.federation.num_examples[sent.client],
        dense=dict(sent.dense),
    )


def learnt(server: Server, sent: Broadcast, update: ClientUpdate) -> Matrices:
    """`M_k - M_k_start`."""
    start = client_start(sent, server.rule, server.options, SHAPES, server.federation.seed)
    return combine((1.0, matrices(update.adapter)), (-1.0, matrices(start.adapter)))


def play(server: Server, seed: int = 0) -> RoundRecord:
    """One round in which all clients that are asked answer."""
    for sent in server.plan().values():
        assert server.accept(train(server, sent, seed)) == ""
    return server.commit()


def spoilt(update: ClientUpdate, value: float, factor: str) -> ClientUpdate:
    """The update with one number of one factor replaced."""
    x = update.adapter["up"]
    A, B = x.A.clone(), x.B.clone()
    (A if factor == "A" else B)[0, 0] = value
    return replace(update, adapter={**update.adapter, "up": LowRank(A, B)})


# --- whom a round asks ---


@law
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    st.none() | st.integers(1, 15) | st.floats(0.01, 1.0),
    st.integers(0, 100),
    st.integers(1, 50),
)
def test_a_sample_has_its_size_and_repeats(
    rows: list[int], wanted: int | float | None, seed: int, round: int
) -> None:
    federation = Federation([1] * len(rows), rows, SHAPES, seed, wanted)
    able = [k for k, n in enumerate(rows) if n]
    found = federation.sample(round)
    assert found == sorted(set(found))
    # One without examples is never asked.
    assert set(found) <= set(able)
    if wanted is None:
        assert found == able
    elif isinstance(wanted, int):
        assert len(found) == min(wanted, len(able))
    else:
        assert len(found) >= 1
        assert abs(len(found) - wanted * len(able)) <= 0.5 or len(found) == 1
    assert Federation([1] * len(rows), rows, SHAPES, seed, wanted).sample(round) == found


def test_samples_differ_by_round_and_seed_and_reach_everyone() -> None:
    def samples(seed: int) -> list[list[int]]:
        federation = Federation([1] * 10, [1] * 10, SHAPES, seed, 3)
        return [federation.sample(round) for round in range(1, 201)]

    assert len({tuple(s) for s in samples(0)}) > 60
    assert samples(0) != samples(1)
    # 60 expected each; the bounds are five standard deviations away.
    counts = Counter(k for s in samples(0) for k in s)
    assert set(counts) == set(range(10))
    assert all(27 < count < 93 for count in counts.values())


def test_a_share_is_rounded_and_asks_at_least_one() -> None:
    def asked(share: float) -> int:
        return len(Federation([1] * 10, [1] * 10, SHAPES, 0, share).sample(1))

    assert [asked(f) for f in (0.01, 0.1, 0.14, 0.25, 0.26, 1.0)] == [1, 1, 1, 3, 3, 10]


def test_plan_asks_the_sample_at_every_client_own_rank() -> None:
    server = serve("exact", [1, 2, 3, 4], num_examples=[5, 0, 5, 5], clients_per_round=2)
    for round in range(1, 6):
        sent = server.plan()
        assert list(sent) == server.federation.sample(round)
        for k, broadcast in sent.items():
            assert (broadcast.round, broadcast.client) == (round, k)
            assert broadcast.rank == server.federation.ranks[k]
        server.commit()
    assert server.state.round == 5


# --- weights ---


@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize("method", ["exact", "flora"])
def test_weights_are_renormalised_over_the_clients_that_counted(method: str, weights: str) -> None:
    server = serve(method, [2, 4, 1, 3], client_weights=weights)
    sent = server.plan()
    updates = {k: train(server, b) for k, b in sent.items()}
    # Client 0 never answers, client 2 sends NaN: clients 1 and 3, of 10 and 5 rows, count.
    for k in (3, 1):
        assert server.accept(updates[k]) == ""
    assert server.accept(spoilt(updates[2], math.nan, "A")) != ""
    share = {"examples": {1: 2 / 3, 3: 1 / 3}, "uniform": {1: 0.5, 3: 0.5}}[weights]
    wanted = combine(*[(p, learnt(server, sent[k], updates[k])) for k, p in share.items()])
    record = server.commit()
    assert distance(model(server), wanted) <= 1e-12 * size(wanted)
    found = {c.client: c.weight for c in record.clients}
    assert found == pytest.approx({0: 0.0, 2: 0.0, **share})
    assert [c.client for c in record.clients] == [0, 1, 2, 3]


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_an_update_trained_on_no_rows_does_not_count(weights: str) -> None:
    server = serve("exact", client_weights=weights)
    play(server)
    before = model(server)
    sent = server.plan()
    server.accept(replace(train(server, sent[1]), num_examples=0))
    record = server.commit()
    assert [c.weight for c in record.clients] == [0.0] * 4
    assert record.aggregation_error is None
    assert distance(model(server), before) == 0.0
    assert server.state.round == 2


# --- what does not count ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("method", METHODS)
def test_a_client_that_diverged_is_left_out_and_the_round_goes_on(
    method: str, factor: str, value: float
) -> None:
    with_it, without = serve(method), serve(method)
    sent = with_it.plan()
    without.plan()
    for k in (0, 2):
        for server in (with_it, without):
            server.accept(train(server, sent[k]))
    reason = with_it.accept(spoilt(train(with_it, sent[1]), value, factor))
    assert "NaN or Inf" in reason
    assert "up" in reason
    record = with_it.commit()
    without.commit()
    assert distance(model(with_it), model(without)) == 0.0
    told = {c.client: c.rejected for c in record.clients}
    assert told == {0: "", 1: reason, 2: "", 3: ""}


@pytest.mark.parametrize("method", METHODS)
def test_with_no_update_that_counts_the_model_stays(method: str) -> None:
    server = serve(method, server_momentum=0.5, dense={"head": torch.ones(2)})
    play(server)
    before = server.state
    for k, sent in server.plan().items():
        if k < 2:
            server.accept(spoilt(train(server, sent), math.nan, "B"))
        else:
            server.reject(k, "lost the connection")
    record = server.commit()
    after = server.state
    assert after.round == before.round + 1
    assert after.adapter == before.adapter
    assert after.base_delta == before.base_delta
    assert after.dense == before.dense
    assert after.momentum == before.momentum
    assert not after.last_merge
    assert record.aggregation_error is None
    assert record.update_norm == pytest.approx(0.0, abs=1e-6)
    assert all(c.rejected and c.weight == 0.0 for c in record.clients)
    assert [c.bytes_up > 0 for c in record.clients] == [c.client < 2 for c in record.clients]
    # And the next round is an ordinary one.
    assert play(server).update_norm > 0


def test_a_client_can_be_taken_back_after_it_answered() -> None:
    with_it, without = serve("exact"), serve("exact")
    sent = with_it.plan()
    without.plan()
    for k in (0, 1):
        with_it.accept(train(with_it, sent[k]))
    without.accept(train(without, sent[0]))
    with_it.reject(1, "failed afterwards")
    record = with_it.commit()
    without.commit()
    assert distance(model(with_it), model(without)) == 0.0
    assert record.clients[1].rejected == "failed afterwards"


def wrong_updates() -> dict[str, Callable[[ClientUpdate], ClientUpdate]]:
    def other(m: int, n: int, rank: int) -> LowRank:
        return LowRank(torch.zeros(rank, n), torch.zeros(m, rank))

    def put(**modules: LowRank) -> Callable[[ClientUpdate], ClientUpdate]:
        return lambda u: replace(u, adapter={**u.adapter, **modules})

    return {
        "an earlier round": lambda u: replace(u, round=u.round - 1),
        "a later round": lambda u: replace(u, round=u.round + 1),
        "a client not asked": lambda u: replace(u, client=2),
        "a client unknown": lambda u: replace(u, client=77),
        "another rank": put(up=other(8, 10, 2)),
        "another shape": put(up=other(10, 8, 3)),
        "a module too many": put(more=other(8, 10, 3)),
        "a module too few": lambda u: replace(u, adapter={"up": u.adapter["up"]}),
        "no module": lambda u: replace(u, adapter={}),
        "a dense parameter unknown": lambda u: replace(u, dense={"tail": torch.zeros(2)}),
        "a dense parameter misshapen": lambda u: replace(u, dense={"head": torch.zeros(3)}),
    }


@pytest.mark.parametrize("wrong", wrong_updates())
def test_an_update_that_was_not_asked_for_is_an_error_and_changes_nothing(wrong: str) -> None:
    server = serve("exact", num_examples=[5, 5, 0, 5], dense={"head": torch.zeros(2)})
    play(server)
    sent = server.plan()
    good = train(server, sent[1])
    with pytest.raises(ValueError, match=r"client \d+ sent"):
        server.accept(wrong_updates()[wrong](good))
    # The right one is still taken, and the round can be closed.
    assert server.accept(good) == ""
    record = server.commit()
    assert [c.weight for c in record.clients] == [0.0, 1.0, 0.0]


def test_an_update_sent_twice_is_an_error() -> None:
    server = serve("exact")
    sent = server.plan()
    update = train(server, sent[0])
    server.accept(update)
    bad = spoilt(train(server, sent[1]), math.nan, "A")
    server.accept(bad)
    for again in (update, bad):
        with pytest.raises(ValueError, match="done with round 1 already"):
            server.accept(again)


def test_an_update_outside_a_round_is_an_error() -> None:
    server = serve("exact")
    update = train(server, server.plan()[0])
    server.accept(update)
    server.commit()
    with pytest.raises(ValueError, match="nobody asked for"):
        server.accept(update)
    with pytest.raises(ValueError, match="nobody asked for"):
        serve("exact").accept(update)


def test_planning_again_opens_the_round_anew() -> None:
    server = serve("exact")
    sent = server.plan()
    server.accept(train(server, sent[0]))
    again = server.plan()
    assert list(again) == list(sent)
    assert again[0].round == sent[0].round
    assert server.accept(train(server, again[0])) == ""


# --- the server's own step ---


@pytest.mark.parametrize("method", ["exact", "flora"])
@pytest.mark.parametrize(("rate", "momentum"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.9), (0.3, 0.5)])
def test_rate_and_momentum_step_the_products(method: str, rate: float, momentum: float) -> None:
    server = serve(method, [2, 4, 1, 3], server_learning_rate=rate, server_momentum=momentum)
    wanted, velocity, scale = matrices({}), matrices({}), 0.0
    for round in range(5):
        sent = server.plan()
        updates = {k: train(server, b, round) for k, b in sent.items()}
        mean = combine(
            *[(ROWS[k] / sum(ROWS), learnt(server, sent[k], u)) for k, u in updates.items()]
        )
        for update in updates.values():
            server.accept(update)
        record = server.commit()
        velocity = combine((momentum, velocity), (1.0, mean))
        wanted = combine((1.0, wanted), (rate, velocity))
        scale += size(velocity) + size(wanted)
        assert distance(model(server), wanted) <= 1e-12 * scale
        assert (record.aggregation_error is None) == ((rate, momentum) != (1.0, 0.0))


@pytest.mark.parametrize(("rate", "momentum"), [(0.5, 0.0), (1.0, 0.9), (0.3, 0.5)])
def test_rate_and_momentum_step_the_factors_of_fedit(rate: float, momentum: float) -> None:
    adapter = random_adapter(3, 1)
    server = serve("fedit", given=adapter, server_learning_rate=rate, server_momentum=momentum)
    began = {n: x for n, x in server.state.adapter.items() if isinstance(x, LowRank)}
    assert began.keys() == adapter.keys()
    wanted = {n: [x.A.clone(), x.B.clone()] for n, x in began.items()}
    velocity = {n: [torch.zeros_like(x.A), torch.zeros_like(x.B)] for n, x in adapter.items()}
    for round in range(4):
        updates = {k: train(server, b, round) for k, b in server.plan().items()}
        for update in updates.values():
            server.accept(update)
        server.commit()
        for name in SHAPES:
            held = server.state.adapter[name]
            assert isinstance(held, LowRank)
            for i, got in enumerate((held.A, held.B)):
                sends = [(u.adapter[name].A, u.adapter[name].B)[i] for u in updates.values()]
                mean = sum(ROWS[k] * t for k, t in zip(updates, sends, strict=True)) / sum(ROWS)
                velocity[name][i] = momentum * velocity[name][i] + mean - wanted[name][i]
                wanted[name][i] = wanted[name][i] + rate * velocity[name][i]
                torch.testing.assert_close(got, wanted[name][i], rtol=0, atol=1e-11)


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_dense_parameters_are_averaged(method: str, rate: float) -> None:
    head, bias = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([[3.0]], dtype=F64)
    server = serve(method, dense={"head": head, "bias": bias}, server_learning_rate=rate)
    sent = server.plan()
    moved = {k: torch.tensor([k + 5.0, -k], dtype=F64) for k in sent}
    for k, broadcast in sent.items():
        assert torch.equal(broadcast.dense["head"], head)
        update = train(server, broadcast)
        # Client 1 diverged in the head only: all of its update is left out.
        value = math.nan * moved[k] if k == 1 else moved[k]
        told = server.accept(replace(update, dense={"head": value, "bias": bias}))
        assert bool(told) == (k == 1)
    server.commit()
    counted = {k: ROWS[k] / (sum(ROWS) - ROWS[1]) for k in sent if k != 1}
    mean = sum(p * moved[k] for k, p in counted.items())
    torch.testing.assert_close(server.state.dense["head"], head + rate * (mean - head))
    torch.testing.assert_close(server.state.dense["bias"], bias)
    assert torch.equal(head, torch.tensor([1.0, 2.0], dtype=F64))


# --- what is recorded ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", ["nothing", "an adapter"])
def test_the_aggregation_error_is_that_of_the_matrices(method: str, start: str) -> None:
    ranks = [3, 3, 3, 3] if method == "fedit" else [2, 4, 1, 3]
    adapter = random_adapter(max(ranks), 5) if start == "an adapter" else None
    server = serve(method, ranks, given=adapter)
    for round in range(3):
        before = model(server)
        sent = server.plan()
        updates = {k: train(server, b, round) for k, b in sent.items()}
        ideal = combine(
            *[(ROWS[k] / sum(ROWS), learnt(server, sent[k], u)) for k, u in updates.items()]
        )
        for update in updates.values():
            server.accept(update)
        record = server.commit()
        moved = combine((1.0, model(server)), (-1.0, before))
        wanted = distance(moved, ideal) / size(ideal)
        assert record.aggregation_error == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert record.update_norm == pytest.approx(size(moved), rel=1e-6)
        if method in ("exact", "flora"):
            assert record.aggregation_error <= 1e-6
        else:
            assert record.aggregation_error > 0.01


@pytest.mark.parametrize("method", ["fedit", "zero_pad"])
@pytest.mark.parametrize("same", ["A", "B"])
def test_averaging_factors_is_exact_where_one_of_them_is_common(method: str, same: str) -> None:
    server = serve(method, given=random_adapter(3, 5))
    sent = server.plan()
    common = random_adapter(3, 6)
    for broadcast in sent.values():
        update = train(server, broadcast)
        adapter = {
            n: LowRank(common[n].A, x.B) if same == "A" else LowRank(x.A, common[n].B)
            for n, x in update.adapter.items()
        }
        server.accept(replace(update, adapter=adapter))
    error = server.commit().aggregation_error
    assert error is not None
    assert error <= 1e-7


def test_there_is_no_aggregation_error_where_nothing_was_learnt() -> None:
    server = serve("flora")
    for k, sent in server.plan().items():
        start = client_start(sent, server.rule, server.options, SHAPES, server.federation.seed)
        server.accept(ClientUpdate(k, sent.round, start.adapter, 5))
    record = server.commit()
    assert record.aggregation_error is None
    assert record.update_norm == 0.0


def test_flora_sends_one_who_was_there_only_what_the_last_round_merged() -> None:
    head = torch.zeros(7)
    server = serve("flora", [2, 1, 1, 2], dense={"head": head}, clients_per_round=2)
    kinds: Counter[str] = Counter()
    for round in range(1, 15):
        state = server.state
        for k, sent in server.plan().items():
            whole, merged = nbytes(state.base_delta), nbytes(state.last_merge)
            there = round > 1 and state.last_seen.get(k) == round - 1
            wanted = min(whole, merged) if there else whole
            assert sent.nbytes == head.nbytes + wanted
            if there and merged < whole:
                kinds["only the last"] += 1
            kinds["all"] += not there and round > 1
            server.accept(train(server, sent))
        record = server.commit()
        assert record.bytes_down == sum(c.bytes_down for c in record.clients) > 0
        assert all(server.state.last_seen[c.client] == round for c in record.clients)
    assert min(kinds["only the last"], kinds["all"]) > 0, "one of the cases never came up"


def test_flora_sends_nothing_after_a_round_that_merged_nothing() -> None:
    server = serve("flora")
    play(server)
    server.plan()
    server.commit()
    assert nbytes(server.state.base_delta) > 0
    assert all(sent.nbytes == 0 for sent in server.plan().values())


def test_what_flora_merged_is_sent_at_the_rank_it_has() -> None:
    server = serve("flora", [2, 2, 2])
    common = random_adapter(2, 1)
    for k, sent in server.plan().items():
        server.accept(ClientUpdate(k, sent.round, common, 5))
    server.commit()
    # Three clients' stack of one and the same update comes to that update, where factors hold it.
    state = server.state
    held = {n: x for n, x in state.last_merge.items() if isinstance(x, LowRank)}
    assert held
    assert nbytes(held) == nbytes({n: common[n] for n in held})
    assert all(sent.nbytes == nbytes(state.last_merge) for sent in server.plan().values())


def test_commit_needs_an_open_round() -> None:
    server = serve("exact")
    with pytest.raises(ValueError, match="plan"):
        server.commit()
    play(server)
    with pytest.raises(ValueError, match="plan"):
        server.commit()


@pytest.mark.parametrize("method", METHODS)
def test_server_momentum_acts_on_dense_parameters_too(method: str) -> None:
    server = serve(method, dense={"head": torch.zeros(1)}, server_momentum=0.5)
    expected, velocity = 0.0, 0.0
    for _ in range(3):
        for sent in server.plan().values():
            server.accept(replace(train(server, sent), dense={"head": sent.dense["head"] + 1.0}))
        server.commit()
        velocity = 0.5 * velocity + 1.0
        expected += velocity
        assert float(server.state.dense["head"]) == pytest.approx(expected)


def held_bytes(state: ServerState) -> int:
    return sum(
        x.W.numel() * x.W.element_size()
        if isinstance(x, Dense)
        else (x.A.numel() + x.B.numel()) * x.A.element_size()
        for x in state.adapter.values()
    )


def test_exact_sends_everyone_the_whole_adapter_and_directions_beside_a_dense_one() -> None:
    server = serve("exact", [1, 2, 4, 2], options={"start_fraction": 1.0})
    for _ in range(4):
        state = server.state
        for k, sent in server.plan().items():
            rank = server.federation.ranks[k]
            beside = sum(
                rank * sum(SHAPES[n]) * x.W.element_size()
                for n, x in state.adapter.items()
                if isinstance(x, Dense)
            )
            assert sent.nbytes == held_bytes(state) + beside
            server.accept(train(server, sent))
        server.commit()
    assert any(isinstance(x, Dense) for x in server.state.adapter.values())


def test_factor_rules_send_the_part_of_the_clients_own_rank() -> None:
    server = serve("zero_pad", [1, 2, 4, 2])
    play(server)
    for k, sent in server.plan().items():
        assert (
            sent.nbytes == server.federation.ranks[k] * sum(m + n for m, n in SHAPES.values()) * 4
        )


@pytest.mark.parametrize("method", METHODS)
def test_bytes_up_are_those_of_the_tensors_sent(method: str) -> None:
    server = serve(method, dense={"head": torch.zeros(7)})
    for sent in server.plan().values():
        server.accept(replace(train(server, sent), dense={"head": torch.zeros(7)}))
    record = server.commit()
    each = 3 * sum(m + n for m, n in SHAPES.values()) * 8 + 7 * 4
    assert [c.bytes_up for c in record.clients] == [each] * 4
    assert record.bytes_up == 4 * each


def test_a_round_is_recorded_client_by_client() -> None:
    server = serve("exact", [2, 4, 1, 3])
    for k, sent in server.plan().items():
        server.accept(replace(train(server, sent), metrics={"loss": float(k)}))
    record = server.commit()
    assert record.round == server.state.round == 1
    assert [c.rank for c in record.clients] == [2, 4, 1, 3]
    assert [c.num_examples for c in record.clients] == list(ROWS)
    assert [c.metrics for c in record.clients] == [{"loss": float(k)} for k in range(4)]
    assert record.truncation_error == 0.0
    assert record.global_rank == 2 + 4 + 1 + 3


def test_a_state_is_never_changed_in_place() -> None:
    server = serve("exact")
    play(server)
    before = server.state
    held = {n: model(server)[n].clone() for n in SHAPES}
    seen = dict(before.last_seen)
    play(server)
    assert server.state is not before
    assert before.round == 1
    assert before.last_seen == seen
    assert distance(matrices(global_delta(before)), held) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_reproducible_and_goes_on_from_its_state(method: str) -> None:
    """A server made anew from the state between two rounds makes the same bits."""
    through, stopped = serve(method, clients_per_round=2), serve(method, clients_per_round=2)
    for _ in range(4):
        play(through)
        play(stopped)
        stopped = Server(stopped.federation, stopped.rule, stopped.options, stopped.state)
    assert distance(model(through), model(stopped)) == 0.0
    assert through.state.last_seen == stopped.state.last_seen

"""The aggregation rules, driven through the server by simulated clients, against dense algebra.

A simulated client starts where the rule says and moves its factors by a random step. What the
global model must become is then computed from matrices in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.errors import InputError
from fedlora.federation import Federation, Server, client_start, global_delta, initial_state
from fedlora.lowrank import (
    Adapter,
    Delta,
    Deltas,
    Dense,
    LowRank,
    add_all,
    prefix,
    refactor,
    scale_all,
)
from fedlora.methods import METHODS, exact
from fedlora.methods.rule import Rule
from fedlora.state import (
    Broadcast,
    ClientUpdate,
    Encoded,
    RoundRecord,
    ServerState,
    Start,
)

law = settings(max_examples=60, deadline=None, derandomize=True)

# Relative to sum_k p_k ||s_k B_k A_k||, summed over the rounds.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
DTYPES = list(TOLERANCE)

# Held as factors up to rank 5 (attn, mlp) and 1 (gate), so that some states turn dense and some
# ranks exceed a dimension; `wide` stays as factors.
SHAPES = {"attn": (12, 9), "gate": (3, 5), "mlp": (7, 20), "wide": (60, 60)}

Matrices = dict[str, Tensor]


def matrices(deltas: Deltas) -> Matrices:
    """Every module's matrix in float64, zero where it is not named."""
    out = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
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
    """The global model's difference from the base."""
    return matrices(global_delta(server.state))


def random(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_adapter(rank: int, seed: int, dtype: torch.dtype) -> dict[str, LowRank]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(random((rank, n), g, dtype), random((m, rank), g, dtype))
        for name, (m, n) in SHAPES.items()
    }


def train(sent: Broadcast, start: Start, seed: int, dtype: torch.dtype) -> ClientUpdate:
    """A client's update: its start, moved by a random step."""
    g = torch.Generator().manual_seed(seed * 1009 + sent.round * 101 + sent.client)
    adapter = {
        name: LowRank(
            x.A.to(dtype) + 0.5 * random(x.A.shape, g, dtype),
            x.B.to(dtype) + 0.5 * random(x.B.shape, g, dtype),
        )
        for name, x in start.adapter.items()
    }
    return ClientUpdate(sent.client, sent.round, adapter, num_examples=10 + 7 * sent.client)


@dataclass(frozen=True)
class Round:
    """One simulated round.

    `wanted` is `sum_k p_k (M_k - M_k_start)`, `size` is `sum_k p_k ||M_k||`.
    """

    sent: Mapping[int, Broadcast]
    starts: Mapping[int, Start]
    updates: Mapping[int, ClientUpdate]
    weights: Mapping[int, float]
    wanted: Matrices
    size: float
    record: RoundRecord


def start_of(server: Server, sent: Broadcast) -> Start:
    return client_start(sent, server.rule, server.options, SHAPES, server.federation.seed)


def shares(updates: Mapping[int, ClientUpdate]) -> dict[int, float]:
    total = sum(u.num_examples for u in updates.values())
    return {k: u.num_examples / total for k, u in updates.items()}


def play(
    server: Server, seed: int, dtype: torch.dtype, order: Sequence[int] | None = None
) -> Round:
    """One round in which all clients that are asked answer."""
    sent = server.plan()
    starts = {k: start_of(server, b) for k, b in sent.items()}
    updates = {k: train(b, starts[k], seed, dtype) for k, b in sent.items()}
    for k in order or sent:
        assert server.accept(updates[k]) == ""
    weights = shares(updates)
    trained = {k: matrices(u.adapter) for k, u in updates.items()}
    began = {k: matrices(s.adapter) for k, s in starts.items()}
    wanted = combine(*[(p, trained[k]) for k, p in weights.items()])
    wanted = combine((1.0, wanted), *[(-p, began[k]) for k, p in weights.items()])
    scale = sum(p * size(trained[k]) for k, p in weights.items())
    return Round(sent, starts, updates, weights, wanted, scale, server.commit())


def serve(
    method: str,
    ranks: Sequence[int],
    given: Adapter | None = None,
    clients_per_round: int | float | None = None,
    **options: Any,
) -> Server:
    rule = METHODS[method]
    federation = Federation(
        ranks, [10 + 7 * k for k in range(len(ranks))], SHAPES, 5, clients_per_round
    )
    state = initial_state(federation, rule, given)
    return Server(federation, rule, rule.options(**options), state)


mixed_ranks = st.lists(st.integers(1, 9), min_size=1, max_size=5)
participation = st.sampled_from([None, 1, 2, 0.3, 0.6, 1.0])
exact_options = st.fixed_dictionaries(
    {
        "start_fraction": st.sampled_from([0.0, 0.3, 0.5, 1.0]),
        "max_rank": st.sampled_from([None, 1, 3, 100]),
    }
)
given_ranks = st.sampled_from([None, 1, 4, 12])
seeds = st.integers(0, 10_000)


# --- exactness ---


@law
@given(mixed_ranks, participation, given_ranks, seeds, st.sampled_from(DTYPES))
def test_flora_is_the_dense_recursion(
    ranks: list[int],
    clients_per_round: int | float | None,
    given_rank: int | None,
    seed: int,
    dtype: torch.dtype,
) -> None:
    adapter = random_adapter(given_rank, seed, dtype) if given_rank else None
    server = serve("flora", ranks, adapter, clients_per_round)
    wanted = matrices(adapter or {})
    scale = size(wanted)
    for _ in range(3):
        done = play(server, seed, dtype)
        wanted, scale = combine((1.0, wanted), (1.0, done.wanted)), scale + done.size
        assert distance(model(server), wanted) <= TOLERANCE[dtype] * scale
        # All of it is merged, and every client starts afresh: B = 0.
        assert not server.state.adapter
        assert all(not x.B.any() for s in done.starts.values() for x in s.adapter.values())


@settings(law, max_examples=120)
@given(mixed_ranks, participation, given_ranks, exact_options, seeds, st.sampled_from(DTYPES))
def test_exact_is_the_dense_recursion(
    ranks: list[int],
    clients_per_round: int | float | None,
    given_rank: int | None,
    options: dict[str, Any],
    seed: int,
    dtype: torch.dtype,
) -> None:
    adapter = random_adapter(given_rank, seed, dtype) if given_rank else None
    server = serve("exact", ranks, adapter, clients_per_round, **options)
    wanted = matrices(adapter or {})
    scale = size(wanted)
    for _ in range(4):
        before = model(server)
        done = play(server, seed, dtype)
        for k, start in done.starts.items():
            broadcast = matrices(done.sent[k].adapter)
            assert all(x.rank == ranks[k] for x in start.adapter.values())
            # What is trained and what lies frozen beside it are what was sent.
            split = combine((1.0, matrices(start.adapter)), (1.0, matrices(start.rest)))
            assert distance(split, broadcast) <= TOLERANCE[dtype] * max(size(broadcast), scale)
            # What was sent is the global model, but for what max_rank cut off.
            cut = distance(broadcast, before) / (size(before) or 1.0)
            assert done.record.truncation_error == pytest.approx(cut, abs=1e-5)
        if options["max_rank"] in (None, 100):
            assert done.record.truncation_error == 0.0
        # The server goes on with S in full: what was cut off is not lost.
        wanted, scale = combine((1.0, wanted), (1.0, done.wanted)), scale + done.size
        assert distance(model(server), wanted) <= TOLERANCE[dtype] * scale
        assert not server.state.base_delta


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_turns_dense_where_factors_are_larger_and_stays_right(dtype: torch.dtype) -> None:
    server = serve("exact", [2, 1, 3], start_fraction=0.5)
    wanted, scale = matrices({}), 0.0
    forms = []
    for _ in range(8):
        done = play(server, 3, dtype)
        wanted, scale = combine((1.0, wanted), (1.0, done.wanted)), scale + done.size
        assert distance(model(server), wanted) <= TOLERANCE[dtype] * scale
        forms.append({n: isinstance(x, Dense) for n, x in server.state.adapter.items()})
        for name, x in server.state.adapter.items():
            m, n = SHAPES[name]
            assert x.nbytes <= m * n * dtype.itemsize
        for sent in done.sent.values():
            assert all(isinstance(x, LowRank) for x in sent.leading.values())
    assert not forms[0]["wide"]
    assert all(forms[-1].values())


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("max_rank", [None, 3])
def test_exact_starts_from_the_leading_directions(fraction: float, max_rank: int | None) -> None:
    server = serve("exact", [4, 2, 6], start_fraction=fraction, max_rank=max_rank)
    for _ in range(3):
        play(server, 1, torch.float64)
    state = server.state
    for k, sent in server.plan().items():
        rank = server.federation.ranks[k]
        start = start_of(server, sent)
        for name, x in start.adapter.items():
            whole = refactor(state.adapter[name])
            there = min(whole.rank, max_rank or whole.rank)
            wanted = prefix(whole, min(round(fraction * rank), there))
            assert int(x.B.any(dim=0).sum()) == wanted.rank
            assert torch.allclose(x.B @ x.A, wanted.B @ wanted.A, atol=1e-10)
            # The others are fresh: random A, so that B = 0 can be trained.
            assert bool((x.A.norm(dim=1) > 0).all())


def test_exact_starts_from_the_leading_directions_of_a_given_adapter() -> None:
    # Its own directions come in any order and are not orthogonal.
    adapter = random_adapter(6, 1, torch.float64)["wide"]
    ascending = torch.arange(1.0, 7.0, dtype=torch.float64) ** 2
    given = {"wide": LowRank(adapter.A, adapter.B * ascending)}
    server = serve("exact", [2], given, start_fraction=0.5)
    start = start_of(server, server.plan()[0]).adapter["wide"]
    best = prefix(refactor(LowRank(adapter.A, adapter.B * ascending)), 1)
    assert torch.allclose(start.B @ start.A, best.B @ best.A, atol=1e-9)


def test_starts_of_exact_are_nested() -> None:
    server = serve("exact", [2, 4, 8], start_fraction=1.0)
    play(server, 1, torch.float64)
    starts = [start_of(server, b).adapter["wide"] for b in server.plan().values()]
    for small, large in pairwise(starts):
        assert torch.equal(small.B, large.B[:, : small.rank])
        assert torch.equal(small.A, large.A[: small.rank])


@pytest.mark.parametrize("method", ["exact", "flora"])
def test_a_client_that_comes_back_starts_from_the_present_global_model(method: str) -> None:
    server = serve(method, [3, 2, 5, 1], clients_per_round=2)
    absent: dict[int, int] = dict.fromkeys(range(4), 0)
    longest = 0
    for _ in range(12):
        present = model(server)
        done = play(server, 2, torch.float64)
        for k, start in done.starts.items():
            longest, absent[k] = max(longest, absent[k]), 0
            own = add_all([start.adapter, start.rest, done.sent[k].base_delta])
            assert distance(matrices(own), present) <= 1e-11 * (size(present) + 1)
        absent = {k: n + (k not in done.starts) for k, n in absent.items()}
    assert longest >= 2, "no client was absent for several rounds: the test shows nothing"


def test_fresh_directions_differ_between_clients_and_rounds() -> None:
    server = serve("flora", [3, 3])
    first = [start_of(server, b).adapter["attn"].A for b in server.plan().values()]
    assert not torch.equal(first[0], first[1])
    play(server, 1, torch.float32)
    second = [start_of(server, b).adapter["attn"].A for b in server.plan().values()]
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    "wrong", [{"start_fraction": -0.1}, {"start_fraction": 1.1}, {"max_rank": 0}]
)
def test_impossible_options_of_exact_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        exact.Options(**wrong)


# --- rules that average factors ---


def padded_mean(done: Round, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """`sum_k p_k pad(A_k)`, `sum_k p_k pad(B_k)` in float64."""
    out = {}
    for name, (m, n) in SHAPES.items():
        a = torch.zeros(rank, n, dtype=torch.float64)
        b = torch.zeros(m, rank, dtype=torch.float64)
        for k, p in done.weights.items():
            x = done.updates[k].adapter[name]
            a[: x.rank] += p * x.A.double()
            b[:, : x.rank] += p * x.B.double()
        out[name] = (a, b)
    return out


def assert_factors(server: Server, wanted: dict[str, tuple[Tensor, Tensor]], tol: float) -> None:
    for name, (a, b) in wanted.items():
        found = server.state.adapter[name]
        assert isinstance(found, LowRank)
        # Means of values near 1 are compared absolutely: the start cancels in the sum.
        assert float((found.A.double() - a).abs().max()) <= 4 * tol
        assert float((found.B.double() - b).abs().max()) <= 4 * tol


@law
@given(st.integers(1, 9), st.integers(1, 4), participation, seeds, st.sampled_from(DTYPES))
def test_fedit_is_the_mean_of_the_factors(
    rank: int,
    clients: int,
    clients_per_round: int | float | None,
    seed: int,
    dtype: torch.dtype,
) -> None:
    given_adapter = random_adapter(rank, seed, dtype)
    server = serve("fedit", [rank] * clients, given_adapter, clients_per_round)
    for _ in range(2):
        done = play(server, seed, dtype)
        assert_factors(server, padded_mean(done, rank), TOLERANCE[dtype])
        assert not server.state.base_delta


@law
@given(mixed_ranks, participation, seeds, st.sampled_from(DTYPES))
def test_zero_pad_is_the_mean_of_the_padded_factors(
    ranks: list[int], clients_per_round: int | float | None, seed: int, dtype: torch.dtype
) -> None:
    given_adapter = random_adapter(max(ranks), seed, dtype)
    server = serve("zero_pad", ranks, given_adapter, clients_per_round)
    for _ in range(2):
        done = play(server, seed, dtype)
        assert_factors(server, padded_mean(done, max(ranks)), TOLERANCE[dtype])
        assert not server.state.base_delta


def test_zero_pad_dilutes_the_tail_and_gives_prefixes_back() -> None:
    server = serve("zero_pad", [1, 4], random_adapter(4, 1, torch.float64))
    done = play(server, 1, torch.float64)
    x = server.state.adapter["attn"]
    assert isinstance(x, LowRank)
    # Only client 1 trains directions 2 to 4, and the zeros of client 0 take its share of them.
    large = done.updates[1].adapter["attn"]
    torch.testing.assert_close(x.A[1:], done.weights[1] * large.A[1:])
    torch.testing.assert_close(x.B[:, 1:], done.weights[1] * large.B[:, 1:])
    assert done.weights[1] < 1
    for k, sent in server.plan().items():
        rank = server.federation.ranks[k]
        start = start_of(server, sent).adapter["attn"]
        for got in (start, sent.adapter["attn"]):
            assert isinstance(got, LowRank)
            assert torch.equal(got.A, x.A[:rank])
            assert torch.equal(got.B, x.B[:, :rank])


@pytest.mark.parametrize("method", ["fedit", "zero_pad"])
def test_rules_that_average_factors_start_from_one_shared_a(method: str) -> None:
    server = serve(method, [4, 4] if method == "fedit" else [2, 4])
    starts = [start_of(server, b).adapter for b in server.plan().values()]
    for name in SHAPES:
        small, large = starts[0][name], starts[1][name]
        assert torch.equal(small.A, large.A[: small.rank])
        assert bool((large.A.norm(dim=1) > 0).all())
        assert not large.B.any()


def test_fedit_refuses_mixed_ranks() -> None:
    with pytest.raises(InputError, match=r"fedit needs one rank.*4 2"):
        serve("fedit", [4, 2])
    for method in ("zero_pad", "flora", "exact"):
        serve(method, [4, 2])


# --- invariances ---


def ranks_for(method: str) -> list[int]:
    return [3, 3, 3, 3] if method == "fedit" else [4, 1, 2, 6]


def bits(state: ServerState) -> list[tuple[str, Tensor]]:
    """Every tensor of a state, named."""
    out: list[tuple[str, Tensor]] = []
    for part in ("adapter", "base_delta", "last_merge"):
        for name, x in getattr(state, part).items():
            held = [x.W] if isinstance(x, Dense) else [x.A, x.B]
            out += [(f"{part}/{name}", t) for t in held]
    return out


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_arrival_changes_no_bit(method: str) -> None:
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]
    servers = [serve(method, ranks_for(method)) for _ in orders]
    for _ in range(3):
        for server, order in zip(servers, orders, strict=True):
            play(server, 4, torch.float32, order)
        first, *others = [bits(server.state) for server in servers]
        for found in others:
            assert [n for n, _ in found] == [n for n, _ in first]
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, found, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_clients_changes_only_rounding(method: str, dtype: torch.dtype) -> None:
    ranks, order = ranks_for(method), [2, 0, 3, 1]
    server = serve(method, ranks, random_adapter(max(ranks), 1, dtype))
    play(server, 1, dtype)
    federation = server.federation
    # Client k of the one is client order[k] of the other.
    place = {new: old for old, new in enumerate(order)}
    other = Server(
        replace(federation, ranks=[ranks[place[k]] for k in range(4)]),
        server.rule,
        server.options,
        server.state,
    )
    other.plan()
    scale = size(model(server))
    done = play(server, 2, dtype)
    for k, update in done.updates.items():
        assert other.accept(replace(update, client=order[k])) == ""
    other.commit()
    assert distance(model(server), model(other)) <= TOLERANCE[dtype] * (scale + done.size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_clients_are_a_fixed_point(method: str, dtype: torch.dtype) -> None:
    server = serve(method, [4, 4, 4], random_adapter(4, 1, dtype))
    for i in range(3):
        sent = server.plan()
        start = start_of(server, sent[0])
        frozen = matrices(add_all([sent[0].base_delta, start.rest]))
        sends = random_adapter(4, 10 + i, dtype)
        for k in sent:
            server.accept(ClientUpdate(k, sent[k].round, sends, 5 + k))
        server.commit()
        wanted = combine((1.0, frozen), (1.0, matrices(sends)))
        scale = size(frozen) + size(matrices(sends))
        assert distance(model(server), wanted) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("method", METHODS)
def test_one_client_gets_what_it_trained(method: str) -> None:
    server = serve(method, [4])
    for i in range(3):
        sent = server.plan()[0]
        start = start_of(server, sent)
        frozen = matrices(add_all([sent.base_delta, start.rest]))
        update = train(sent, start, i, torch.float64)
        server.accept(update)
        server.commit()
        wanted = combine((1.0, frozen), (1.0, matrices(update.adapter)))
        # Factors of a shared start are float32.
        assert distance(model(server), wanted) <= 5e-6 * size(wanted)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_that_is_handed_over_is_changed(method: str) -> None:
    ranks = ranks_for(method)
    given_adapter = random_adapter(max(ranks) + 1, 1, torch.float32)
    server = serve(method, ranks, given_adapter)
    for i in range(3):
        sent = server.plan()
        starts = {k: start_of(server, b) for k, b in sent.items()}
        updates = {k: train(b, starts[k], i, torch.float32) for k, b in sent.items()}
        held: list[Delta] = [*given_adapter.values()]
        for k in sent:
            for part in (updates[k].adapter, starts[k].adapter, starts[k].rest):
                held += part.values()
            for part in (sent[k].adapter, sent[k].leading, sent[k].base_delta):
                held += part.values()
        tensors = [t for x in held for t in ([x.W] if isinstance(x, Dense) else [x.A, x.B])]
        tensors += [t for _, t in bits(server.state)]
        before = [t.clone() for t in tensors]
        for update in updates.values():
            server.accept(update)
        server.commit()
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


# --- aggregate == finish(sum_k p_k encode_k) ---


@dataclass(frozen=True)
class Told:
    """A server before and after a round, and what every client's update encodes to."""

    rule: Rule
    before: ServerState
    after: ServerState
    encoded: list[tuple[float, Encoded]]
    done: Round


def tell(method: str) -> Told:
    server = serve(method, ranks_for(method), random_adapter(6, 1, torch.float64))
    play(server, 1, torch.float64)
    before = server.state
    done = play(server, 2, torch.float64)
    encoded = [
        (p, server.rule.encode(done.updates[k].adapter, done.starts[k], before, server.options))
        for k, p in done.weights.items()
    ]
    return Told(server.rule, before, server.state, encoded, done)


def summed_factors(told: Told) -> dict[str, Tensor]:
    names = told.encoded[0][1].factors
    return {name: sum(p * e.factors[name] for p, e in told.encoded) for name in names}


def summed_products(told: Told) -> Deltas:
    return add_all([scale_all(e.products, p) for p, e in told.encoded])


def finished(told: Told, total: Encoded) -> Matrices:
    """The global model that a rule makes of a weighted sum."""
    aggregate = told.rule.finish(total, told.before, 6, told.rule.options())
    return matrices(add_all([told.before.base_delta, aggregate.merge, aggregate.adapter]))


def assert_finishes_alike(told: Told, total: Encoded) -> None:
    after = matrices(global_delta(told.after))
    assert distance(finished(told, total), after) <= 1e-12 * (size(after) + told.done.size)


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_sees_only_the_weighted_sum(method: str) -> None:
    told = tell(method)
    assert_finishes_alike(told, Encoded(summed_factors(told), summed_products(told)))
    for _, encoded in told.encoded:
        # Which of the two a secure sum has to carry.
        assert bool(encoded.factors) == (told.rule.secure_sum == "factors")
        assert bool(encoded.products) == (told.rule.secure_sum == "products")


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].secure_sum == "products"])
def test_products_may_be_summed_as_matrices(method: str) -> None:
    told = tell(method)
    total = combine(*[(p, matrices(e.products)) for p, e in told.encoded])
    assert_finishes_alike(told, Encoded(products={n: Dense(x) for n, x in total.items()}))


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].secure_sum == "products"])
def test_products_may_be_summed_through_a_linear_sketch(method: str) -> None:
    """Each client sends random projections of its matrix; only their sum is decoded."""
    told = tell(method)
    g = torch.Generator().manual_seed(0)
    total: dict[str, Delta] = {}
    for name, (m, n) in SHAPES.items():
        # Projected column by column, so that the projection is small; here it can be undone.
        sketch = torch.linalg.qr(random((m, m), g, torch.float64))[0]
        sent = [p * (sketch @ matrices(e.products)[name]) for p, e in told.encoded]
        total[name] = Dense(sketch.T @ torch.stack(sent).sum(0))
        assert total[name].shape == (m, n)
    assert_finishes_alike(told, Encoded(products=total))


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].secure_sum == "factors"])
def test_a_rule_that_averages_factors_cannot_be_fed_sums_of_products(method: str) -> None:
    """Their factors are not the mean factors: the law tells the two kinds of rule apart."""
    told = tell(method)
    products = {
        name: refactor(Dense(sum(p * matrices(u)[name] for p, u in trained(told))))
        for name in SHAPES
    }
    factors: dict[str, Tensor] = {}
    for name, current in told.before.adapter.items():
        assert isinstance(current, LowRank)
        best = prefix(products[name], current.rank)
        a, b = torch.zeros_like(current.A), torch.zeros_like(current.B)
        a[: best.rank], b[:, : best.rank] = best.A, best.B
        factors[f"{name}.A"], factors[f"{name}.B"] = a - current.A, b - current.B
    after = matrices(global_delta(told.after))
    assert distance(finished(told, Encoded(factors)), after) > 1e-3 * size(after)


def trained(told: Told) -> list[tuple[float, Adapter]]:
    return [(p, told.done.updates[k].adapter) for k, p in told.done.weights.items()]


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].secure_sum == "products"])
def test_a_rule_that_adds_products_cannot_be_fed_means_of_factors(method: str) -> None:
    told = tell(method)
    means = {}
    for name, (m, n) in SHAPES.items():
        a = torch.zeros(6, n, dtype=torch.float64)
        b = torch.zeros(m, 6, dtype=torch.float64)
        for p, adapter in trained(told):
            x = adapter[name]
            a[: x.rank] += p * x.A
            b[:, : x.rank] += p * x.B
        means[name] = LowRank(a, b)
    after = matrices(global_delta(told.after))
    wrong = finished(told, Encoded(products=means))
    assert distance(wrong, after) > 0.05 * size(after)


# --- an adapter to go on from ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 3, 4, 11, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_given_adapter_is_the_global_model_before_round_1(
    method: str, rank: int, dtype: torch.dtype
) -> None:
    ranks = [4, 4] if method == "fedit" else [2, 4]
    adapter = random_adapter(rank, 1, dtype)
    server = serve(method, ranks, adapter)
    wanted = matrices(adapter)
    tolerance = TOLERANCE[dtype] * size(wanted)
    assert distance(model(server), wanted) <= tolerance
    # The client of the largest rank sees all of it.
    sent = server.plan()[1]
    start = start_of(server, sent)
    own = add_all([start.adapter, start.rest, sent.base_delta])
    assert distance(matrices(own), wanted) <= tolerance
    assert all(x.rank == 4 for x in start.adapter.values())
    # And all of its directions can be trained.
    assert all(bool((x.A.norm(dim=1) > 0).all()) for x in start.adapter.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_module_that_the_given_adapter_lacks_starts_afresh(method: str) -> None:
    adapter = {"attn": random_adapter(2, 1, torch.float32)["attn"]}
    server = serve(method, [4, 4], adapter)
    assert distance(model(server), matrices(adapter)) <= 5e-6 * size(matrices(adapter))
    start = start_of(server, server.plan()[0])
    assert set(start.adapter) == set(SHAPES)
    assert all(x.rank == 4 for x in start.adapter.values())
    play(server, 1, torch.float32)
    assert set(global_delta(server.state)) == set(SHAPES)


def test_the_table_of_methods_is_keyed_by_name() -> None:
    assert {name: rule.name for name, rule in METHODS.items()} == {n: n for n in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_sums_what_it_says(method: str) -> None:
    told = tell(method)
    kinds = {
        kind
        for _, encoded in told.encoded
        for kind, entries in (("factors", encoded.factors), ("products", encoded.products))
        if entries
    }
    assert " and ".join(sorted(kinds)) == told.rule.secure_sum

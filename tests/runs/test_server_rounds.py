"""Rounds of a simulated federation: how the server steps, what is counted, what an error is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.server import Server
from fedlora.lowrank import Delta, Deltas, Dense, LowRank, nbytes
from fedlora.methods import METHODS
from fedlora.seeds import SERVER, Purpose, fresh_factors
from support.server_rounds import KEEPS_FACTORS, SENDS, WITH_MOMENTUM, numbers
from support.simulated import (
    F64,
    SHAPES,
    Kept,
    combine,
    distance,
    matrices,
    model,
    play,
    random_adapter,
    ranks_for,
    serve,
    size,
    train,
)

SUMS = {
    "exact": {},
    "flora": {},
    "florist": {"energy_threshold": 1.0},
    "fedex": {},
    "fedmomentum": {},
    "ffa": {},
    "rolora": {},
    "fedsvd": {},
}


@pytest.mark.parametrize("method", SUMS)
@pytest.mark.parametrize(("rate", "momentum"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.9), (0.3, 0.5)])
def test_rate_and_momentum_step_the_products(method: str, rate: float, momentum: float) -> None:
    if momentum and method not in WITH_MOMENTUM:
        return
    ranks = [2, 4, 1, 3] if METHODS[method].mixed_ranks else [3, 3, 3, 3]
    server = serve(
        method,
        ranks,
        options=SUMS[method],
        server_learning_rate=rate,
        server_momentum=momentum,
    )
    wanted, velocity, scale = matrices({}), matrices({}), 0.0
    for round in range(5):
        done = play(server, round)
        velocity = combine((momentum, velocity), (1.0, done.wanted))
        wanted = combine((1.0, wanted), (rate, velocity))
        scale += size(velocity) + size(wanted)
        assert distance(model(server), wanted) <= 1e-12 * scale
        told = done.record.aggregation_error
        assert (told is None) == ((rate, momentum) != (1.0, 0.0))


@pytest.mark.parametrize(("rate", "momentum"), [(0.5, 0.0), (0.3, 0.5)])
def test_rate_and_momentum_step_towards_the_sum_of_flexlora(rate: float, momentum: float) -> None:
    server = serve("flexlora", [2, 4, 1, 3], server_learning_rate=rate, server_momentum=momentum)
    wanted, velocity, scale = matrices({}), matrices({}), 0.0
    for round in range(4):
        done = play(server, round)
        summed = [(p, matrices(done.ended[k])) for k, p in done.weights.items()]
        velocity = combine((momentum, velocity), *summed, (-1.0, wanted))
        wanted = combine((1.0, wanted), (rate, velocity))
        scale += size(velocity) + size(wanted)
        assert distance(model(server), wanted) <= 1e-12 * scale


@pytest.mark.parametrize("method", ["fedit", "zero_pad", "fedsa"])
@pytest.mark.parametrize(("rate", "momentum"), [(0.5, 0.0), (1.0, 0.9), (0.3, 0.5)])
def test_rate_and_momentum_step_the_factors(method: str, rate: float, momentum: float) -> None:
    adapter = random_adapter(3, 1)
    server = serve(method, given=adapter, server_learning_rate=rate, server_momentum=momentum)
    began = {n: x for n, x in server.state.adapter.items() if isinstance(x, LowRank)}
    assert began.keys() == adapter.keys()
    wanted = {n: [x.A.clone(), x.B.clone()] for n, x in began.items()}
    velocity = {n: [torch.zeros_like(x.A), torch.zeros_like(x.B)] for n, x in adapter.items()}
    kept: Kept = {}
    for round in range(4):
        done = play(server, round, kept=kept)
        for name in SHAPES:
            held = server.state.adapter[name]
            assert isinstance(held, LowRank)
            for i, got in enumerate((held.A, held.B)):
                sends = {k: (x[name].A, x[name].B)[i] for k, x in done.ended.items()}
                mean = sum(p * sends[k] for k, p in done.weights.items())
                velocity[name][i] = momentum * velocity[name][i] + mean - wanted[name][i]
                wanted[name][i] = wanted[name][i] + rate * velocity[name][i]
                torch.testing.assert_close(got, wanted[name][i], rtol=0, atol=1e-11)


EXACT = ["exact", "flora", "fedex", "fedmomentum", "ffa", "rolora", "fedsvd"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", ["nothing", "an adapter"])
def test_the_aggregation_error_is_that_of_the_matrices(method: str, start: str) -> None:
    ranks = ranks_for(METHODS[method])
    adapter = random_adapter(max(ranks), 5) if start == "an adapter" else None
    server = serve(method, ranks, given=adapter)
    kept: Kept = {}
    for round in range(3):
        done = play(server, round, kept=kept)
        told = done.record.aggregation_error
        assert done.record.update_norm == pytest.approx(size(done.change), rel=1e-6, abs=1e-6)
        if method == "fedsa" and start == "nothing":
            # Without a B at the server there is nothing that the sum could be compared with.
            assert told is None
            continue
        assert told == pytest.approx(done.error, rel=1e-5, abs=1e-6)
        first = method == "flexlora" and start == "nothing" and round == 0
        if method in EXACT or method == "fedsa" or first:
            assert told <= 1e-6
        else:
            assert told > 0.01


@pytest.mark.parametrize("method", WITH_MOMENTUM)
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


@pytest.mark.parametrize("method", METHODS)
def test_bytes_up_are_those_of_the_tensors_sent(method: str) -> None:
    server = serve(method, ranks_for(METHODS[method]), dense={"head": torch.zeros(7)})
    kept: Kept = {}
    for round in range(4):
        done = play(server, round, kept=kept)
        factors = SENDS[method][round % 2]
        for k, client in enumerate(done.record.clients):
            update = done.updates[k]
            assert update.sends == factors
            ranks = {x.rank for x in update.adapter.values()}
            assert ranks == {client.rank} or method == "hetlora"
            assert client.bytes_up == 8 * numbers(ranks.pop(), factors) + 7 * 4
        assert done.record.bytes_up == sum(c.bytes_up for c in done.record.clients)


def deltas_bytes(deltas: list[Delta]) -> int:
    return sum(
        t.numel() * t.element_size()
        for x in deltas
        for t in ([x.W] if isinstance(x, Dense) else [x.A, x.B])
    )


@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
@pytest.mark.parametrize("clients_per_round", [None, 2])
def test_bytes_down_are_those_of_what_a_client_lacks(
    method: str, clients_per_round: int | None
) -> None:
    ranks = ranks_for(METHODS[method])
    head = torch.zeros(7)
    server = serve(method, ranks, dense={"head": head}, clients_per_round=clients_per_round)
    kept: Kept = {}
    there: set[int] = set()
    merges: dict[int, Deltas] = {0: {}}
    for round in range(1, 7):
        state = server.state
        sent = server.plan()
        for k, broadcast in sent.items():
            rank = state.ranks[k]
            if method in ("flora", "florist"):
                adapter = 0
            elif method in ("flexlora", "raflora"):
                # As much of the sum as the client's rank holds.
                held = {n: min(rank, x.rank) for n, x in state.adapter.items()}
                adapter = 8 * sum(r * sum(SHAPES[n]) for n, r in held.items())
            elif method == "fedmomentum":
                adapter = deltas_bytes([*state.adapter.values()])
            else:
                factors = {"ffa": "B", "fedsa": "A"}.get(method, "AB")
                if method == "rolora" and k in there:
                    factors = SENDS[method][round % 2]  # what the round before has trained
                rank = max(ranks) if method == "fedex" else rank
                adapter = 8 * numbers(rank, factors)
            last = state.last_seen.get(k)
            base = 0
            for name, x in state.base_delta.items():
                since = [merges[r][name] for r in range(last or 0, round) if name in merges[r]]
                whole = deltas_bytes([x])
                base += whole if last is None else min(whole, deltas_bytes(since))
            assert broadcast.nbytes == head.nbytes + adapter + base
            # In the first round a rule that starts afresh sends the head alone.
            none = round == 1 and method not in KEEPS_FACTORS and method != "fedex"
            assert (broadcast.nbytes == head.nbytes) == none
        there = set(sent)
        for broadcast in sent.values():
            server.accept(train(server, broadcast, round, kept=kept))
        record = server.commit()
        merges[round] = server.state.last_merge
        assert record.bytes_down == sum(b.nbytes for b in sent.values())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("method", ["ffa", "fedsa", "rolora"])
def test_a_given_adapter_is_counted_when_a_client_is_first_sent_it(
    method: str, rank: int, dtype: torch.dtype
) -> None:
    """A client that holds what the seed gives, and what it was sent, lacks no number uncounted."""
    partly = {"attn": random_adapter(rank, 0, dtype)["attn"]}  # the other modules are fresh
    ranks = (1, 3, 2, 3) if METHODS[method].mixed_ranks else (3, 3, 3, 3)
    server = serve(method, ranks, partly, dtype=dtype, clients_per_round=2)
    fresh = fresh_factors(5, 0, SERVER, Purpose.SHARED_INIT, SHAPES)
    held: dict[int, dict[str, Tensor]] = {}
    kept: Kept = {}
    counts: dict[int, list[int]] = {}
    for number in range(1, 9):
        there = {k for k, last in server.state.last_seen.items() if last == number - 1}
        for k, sent in server.plan().items():
            fallback = {}
            for name, (m, _) in SHAPES.items():
                fallback[f"{name}.A"] = fresh(name, sent.rank).to(dtype)
                fallback[f"{name}.B"] = torch.zeros(m, sent.rank, dtype=dtype)
            own = held.get(k) or fallback
            sends = METHODS[method].sent_down(number, k in there)
            whole = sum(
                getattr(x, factor).numel() for x in sent.adapter.values() for factor in sends
            )
            lacking = 0  # of factors that do not travel in this round: directions it cannot know
            for name, x in sent.adapter.items():
                for factor in {"A", "B"} - set(sends):
                    now, then = getattr(x, factor), own[f"{name}.{factor}"]
                    differs = (now != then).any(dim=1 if factor == "A" else 0)
                    lacking += int(differs.sum()) * SHAPES[name][1 if factor == "A" else 0]
            base = nbytes(server.state.base_delta) if k not in server.state.last_seen else 0
            size = torch.empty(0, dtype=dtype).element_size()
            assert sent.nbytes == size * (whole + lacking) + base
            counts.setdefault(k, []).append(lacking)
            held[k] = {f"{n}.{f}": getattr(x, f) for n, x in sent.adapter.items() for f in "AB"}
            server.accept(train(server, sent, number, kept=kept))
        server.commit()
    assert len(counts) == 4
    for found in counts.values():
        assert len(found) > 1
        assert not any(found[1:])
        # The leading directions of the given adapter, of one factor; rolora sends both at first.
        assert (found[0] > 0) == (method != "rolora")


@pytest.mark.parametrize("method", ["ffa", "fedsa"])
def test_one_factor_costs_half_of_two(method: str) -> None:
    one, two = serve(method), serve("fedit")
    kept: Kept = {}
    factor = "A" if method == "fedsa" else "B"
    for round in range(3):
        cheap, full = play(one, round, kept=kept).record, play(two, round).record
        for found, usual in ((cheap.bytes_up, full.bytes_up), (cheap.bytes_down, full.bytes_down)):
            assert usual == 4 * 8 * numbers(3, "AB")
            assert found == 4 * 8 * numbers(3, factor)


@pytest.mark.parametrize(
    ("method", "momentum"),
    [(m, 0.0) for m in KEEPS_FACTORS] + [(m, 0.9) for m in KEEPS_FACTORS if m in WITH_MOMENTUM],
)
def test_a_client_that_is_sent_what_it_lacks_has_the_whole_broadcast(
    method: str, momentum: float
) -> None:
    server = serve(method, clients_per_round=2, server_momentum=momentum)
    initial = server.state.adapter  # follows from the seed
    held: dict[int, dict[str, Delta]] = {}
    kept: Kept = {}
    for round in range(1, 13):
        state, sent = server.state, server.plan()
        now: dict[int, dict[str, Delta]] = {}
        for k, broadcast in sent.items():
            seen = state.last_seen.get(k) == round - 1 and round > 1
            lacking = server.agreement.rule.sent_down(round, seen)
            before = held[k] if seen else initial
            now[k] = dict(broadcast.adapter)
            for name, x in broadcast.adapter.items():
                old = before[name]
                assert isinstance(x, LowRank)
                assert isinstance(old, LowRank)
                assert "A" in lacking or torch.equal(x.A, old.A[: x.rank])
                assert "B" in lacking or torch.equal(x.B, old.B[:, : x.rank])
        held = now
        for broadcast in sent.values():
            server.accept(train(server, broadcast, round, kept=kept))
        server.commit()


@pytest.mark.parametrize("value", [1e6, math.nan])
@pytest.mark.parametrize("method", ["ffa", "rolora", "fedsa", "fedsvd"])
def test_of_a_factor_that_is_not_sent_the_shape_alone_counts(method: str, value: float) -> None:
    server, other = serve(method), serve(method)
    for round in range(2):
        for mine, broadcast in zip(server.plan().values(), other.plan().values(), strict=True):
            update = train(server, mine, round)
            noise = {
                n: LowRank(x.A, torch.full_like(x.B, value))
                if update.sends == "A"
                else LowRank(torch.full_like(x.A, value), x.B)
                for n, x in update.adapter.items()
            }
            assert server.accept(update) == ""
            assert other.accept(replace(train(other, broadcast, round), adapter=noise)) == ""
        assert server.commit().aggregation_error == other.commit().aggregation_error
    for name, x in server.state.adapter.items():
        found = other.state.adapter[name]
        assert isinstance(x, LowRank)
        assert isinstance(found, LowRank)
        assert torch.equal(x.A, found.A)
        assert torch.equal(x.B, found.B)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_reproducible_and_goes_on_from_its_state(method: str) -> None:
    """A server made anew from the state between two rounds makes the same bits."""
    ranks = ranks_for(METHODS[method])
    through, stopped = (serve(method, ranks, clients_per_round=2) for _ in range(2))
    mine: Kept = {}
    other: Kept = {}
    for round in range(4):
        play(through, round, kept=mine)
        play(stopped, round, kept=other)
        stopped = Server(stopped.federation, stopped.state, Mean())
    for name, x in through.state.adapter.items():
        found = stopped.state.adapter[name]
        pairs = [(x.W, found.W)] if isinstance(x, Dense) else [(x.A, found.A), (x.B, found.B)]
        assert all(torch.equal(a, b) for a, b in pairs)
    assert distance(model(through), model(stopped)) == 0.0
    assert through.state.last_seen == stopped.state.last_seen
    assert through.state.ranks == stopped.state.ranks

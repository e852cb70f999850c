"""The federated round as a state machine: whom it asks, what it takes, how it weighs and steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import Agreement, global_delta
from fedlora.federation.messages import ClientUpdate
from fedlora.federation.participants import Federation
from fedlora.federation.server import Server
from fedlora.lowrank import Deltas, Dense, LowRank, nbytes
from fedlora.methods import METHODS
from support.server_rounds import KEEPS_FACTORS, SENDS, STEPPED, WITH_MOMENTUM, numbers
from support.simulated import (
    F64,
    SHAPES,
    answer,
    combine,
    distance,
    idle,
    learnt,
    matrices,
    model,
    moved,
    play,
    random_adapter,
    serve,
    size,
    start_of,
    train,
)

law = settings(max_examples=30, deadline=None, derandomize=True)


FIRST_SENT = [(name, factor) for name, (sends, _) in SENDS.items() for factor in sends]


def spoilt(update: ClientUpdate, value: float, factor: str = "") -> ClientUpdate:
    """The update with one number of one factor, the first that is sent, replaced."""
    x = update.adapter["attn"]
    A, B = x.A.clone(), x.B.clone()
    (A if (factor or update.sends[0]) == "A" else B)[0, 0] = value
    return replace(update, adapter={**update.adapter, "attn": LowRank(A, B)})


def agreed(seed: int) -> Agreement:
    return Agreement(METHODS["fedit"], METHODS["fedit"].options(), SHAPES, seed)


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
    federation = Federation([1] * len(rows), rows, agreed(seed), wanted)
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
    assert Federation([1] * len(rows), rows, agreed(seed), wanted).sample(round) == found


def test_samples_differ_by_round_and_seed_and_reach_everyone() -> None:
    def samples(seed: int) -> list[list[int]]:
        federation = Federation([1] * 10, [1] * 10, agreed(seed), 3)
        return [federation.sample(round) for round in range(1, 201)]

    assert len({tuple(s) for s in samples(0)}) > 60
    assert samples(0) != samples(1)
    # 60 expected each; the bounds are five standard deviations away.
    counts = Counter(k for s in samples(0) for k in s)
    assert set(counts) == set(range(10))
    assert all(27 < count < 93 for count in counts.values())


def test_a_share_is_rounded_and_asks_at_least_one() -> None:
    def asked(share: float) -> int:
        return len(Federation([1] * 10, [1] * 10, agreed(0), share).sample(1))

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


@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize("method", ["exact", "flora"])
def test_weights_are_renormalised_over_the_clients_that_counted(method: str, weights: str) -> None:
    server = serve(method, [2, 4, 1, 3], client_weights=weights, num_examples=[40, 10, 25, 5])
    sent = server.plan()
    updates = {k: train(server, b) for k, b in sent.items()}
    # Client 0 never answers, client 2 sends NaN: clients 1 and 3, of 10 and 5 rows, count.
    for k in (3, 1):
        assert server.accept(updates[k]) == ""
    assert server.accept(spoilt(updates[2], math.nan)) != ""
    share = {"examples": {1: 2 / 3, 3: 1 / 3}, "uniform": {1: 0.5, 3: 0.5}}[weights]
    wanted = combine(
        *[(p, learnt(start_of(server, sent[k]), updates[k])) for k, p in share.items()]
    )
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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("method", "factor"), FIRST_SENT)
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
    assert "attn" in reason
    record = with_it.commit()
    without.commit()
    assert distance(model(with_it), model(without)) == 0.0
    told = {c.client: c.rejected for c in record.clients}
    assert told == {0: "", 1: reason, 2: "", 3: ""}


@pytest.mark.parametrize("method", METHODS)
def test_with_no_update_that_counts_the_model_stays(method: str) -> None:
    momentum = 0.5 if method in WITH_MOMENTUM else 0.0
    server = serve(method, server_momentum=momentum, dense={"head": torch.ones(2)})
    play(server)
    before = server.state
    for k, sent in server.plan().items():
        if k < 2:
            server.accept(spoilt(train(server, sent), math.nan))
        else:
            server.reject(k, "lost the connection")
    record = server.commit()
    after = server.state
    assert after.round == before.round + 1
    assert after.adapter == before.adapter
    assert after.base_delta == before.base_delta
    assert after.dense == before.dense
    assert after.momentum == before.momentum
    assert after.ranks == before.ranks
    assert not after.last_merge
    assert record.aggregation_error is None
    assert record.update_norm == pytest.approx(0.0, abs=1e-6)
    assert all(c.rejected and c.weight == 0.0 for c in record.clients)
    assert [c.bytes_up > 0 for c in record.clients] == [c.client < 2 for c in record.clients]
    # And the next round is an ordinary one.
    assert size(play(server).change) > 0 or method == "fedsa"


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


def test_what_became_of_a_client_is_on_the_record() -> None:
    server = serve("exact")
    sent = server.plan()
    server.accept(train(server, sent[0]))
    server.reject(1, "its line is cut")
    server.reject(2, "too slow", "late")
    server.reject(3, "the round was full", "unneeded")
    with pytest.raises(ValueError, match="client 3 is done with round 1 already"):
        server.accept(train(server, sent[3]))  # its answer comes late, and is refused
    record = server.commit()
    assert [c.outcome for c in record.clients] == ["counted", "failed", "late", "unneeded"]
    assert [c.weight for c in record.clients] == [1.0, 0.0, 0.0, 0.0]


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
        "another rank": put(attn=other(12, 9, 2)),
        "a higher rank": put(**{n: other(m, n_, 4) for n, (m, n_) in SHAPES.items()}),
        "another shape": put(attn=other(9, 12, 3)),
        "a module too many": put(more=other(12, 9, 3)),
        "a module too few": lambda u: replace(u, adapter={"attn": u.adapter["attn"]}),
        "no module": lambda u: replace(u, adapter={}),
        "a dense parameter unknown": lambda u: replace(u, dense={"tail": torch.zeros(2)}),
        "a dense parameter misshapen": lambda u: replace(u, dense={"head": torch.zeros(3)}),
    }


@pytest.mark.parametrize("method", ["exact", "hetlora", "rolora"])
@pytest.mark.parametrize("wrong", wrong_updates())
def test_an_update_that_was_not_asked_for_is_an_error_and_changes_nothing(
    wrong: str, method: str
) -> None:
    server = serve(method, num_examples=[5, 5, 0, 5], dense={"head": torch.zeros(2)})
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
    bad = spoilt(train(server, sent[1]), math.nan)
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


@pytest.mark.parametrize("method", METHODS)
def test_a_server_step_is_refused_where_it_has_no_meaning(method: str) -> None:
    """Sums that carry their own weights take no step; other factors every round no momentum."""
    rate, momentum = {"server_learning_rate": 0.5}, {"server_momentum": 0.9}
    if method in ("hetlora", "raflora"):
        for how in (rate, momentum):
            with pytest.raises(InputError, match=f"method: {method} .*server_learning_rate and"):
                serve(method, **how)
        return
    serve(method, **rate)
    if method in ("rolora", "fedsvd"):
        with pytest.raises(InputError, match=f"method: {method} .*server_momentum"):
            serve(method, **momentum)
    else:
        serve(method, **momentum)


@pytest.mark.parametrize(
    ("method", "rate"), [(m, 1.0) for m in METHODS] + [(m, 0.5) for m in STEPPED]
)
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
    rows = {k: server.federation.num_examples[k] for k in sent if k != 1}
    counted = {k: n / sum(rows.values()) for k, n in rows.items()}
    mean = sum(p * moved[k] for k, p in counted.items())
    torch.testing.assert_close(server.state.dense["head"], head + rate * (mean - head))
    torch.testing.assert_close(server.state.dense["bias"], bias)
    assert torch.equal(head, torch.tensor([1.0, 2.0], dtype=F64))


@pytest.mark.parametrize("method", METHODS)
def test_there_is_no_aggregation_error_where_nothing_was_learnt(method: str) -> None:
    server = serve(method)
    for sent in server.plan().values():
        server.accept(idle(server, sent))
    record = server.commit()
    assert record.aggregation_error is None
    assert record.update_norm == 0.0


def test_flora_sends_what_was_merged_since_or_all_where_that_is_smaller() -> None:
    head = torch.zeros(7)
    server = serve("flora", [2, 1, 1, 2], dense={"head": head}, clients_per_round=2)
    merges: dict[int, Deltas] = {}
    kinds: Counter[str] = Counter()
    for round in range(1, 15):
        state = server.state
        for k, sent in server.plan().items():
            last = state.last_seen.get(k)
            wanted = 0
            for name, x in state.base_delta.items():
                since = [merges[r] for r in range(last or 0, round) if r in merges]
                added = sum(merge[name].nbytes for merge in since if name in merge)
                wanted += x.nbytes if last is None else min(x.nbytes, added)
            assert sent.nbytes == head.nbytes + wanted
            if last is not None and wanted < nbytes(state.base_delta):
                kinds[f"since {min(round - last, 2)}"] += 1
            kinds["all"] += round > 1 and wanted == nbytes(state.base_delta)
            server.accept(train(server, sent))
        record = server.commit()
        merges[round] = server.state.last_merge
        assert record.bytes_down == sum(c.bytes_down for c in record.clients) > 0
        assert all(server.state.last_seen[c.client] == round for c in record.clients)
    assert min(kinds[x] for x in ("since 1", "since 2", "all")) > 0, "a case never came up"


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


def test_exact_sends_what_a_round_has_changed_or_the_module_and_its_basis() -> None:
    server = serve("exact", [1, 2, 4, 2], options={"start_fraction": 1.0})
    earlier = dict.fromkeys(SHAPES, 0)  # directions that were followed before the round
    kinds: Counter[str] = Counter()
    stack = 9  # all ranks together
    for _ in range(5):
        state = server.state
        for sent in server.plan().values():
            wanted = 0
            for name, x in state.adapter.items():
                m, n = SHAPES[name]
                whole = x.nbytes + 8 * state.leading[name].A.numel()
                turn = state.leading[name].rank * (earlier[name] + stack)
                changed = 8 * (stack * (m + n) + turn + min(4, earlier[name]))
                if stack * (m + n) > m * n:  # it was added as a matrix
                    changed = whole
                kinds["whole" if whole <= changed else "changed"] += 1
                wanted += min(whole, changed)
            assert sent.nbytes == wanted
            server.accept(train(server, sent))
        earlier = {name: x.rank for name, x in state.leading.items()} or earlier
        server.commit()
    assert min(kinds["whole"], kinds["changed"]) > 0
    assert any(isinstance(x, Dense) for x in server.state.adapter.values())


def test_factor_rules_begin_in_float32() -> None:
    for method in KEEPS_FACTORS:
        server = serve(method, dtype=torch.float32)
        factors = {"ffa": "B", "fedsa": "A"}.get(method, "AB")
        assert {b.nbytes for b in server.plan().values()} == {4 * numbers(3, factors)}


def pruned(server: Server, k: int, rank: int, round: int = 0) -> ClientUpdate:
    """An update of client k of the first directions only."""
    sent = server.plan()[k]
    adapter = {n: LowRank(x.A[:rank], x.B[:, :rank]) for n, x in moved(server, sent, round).items()}
    return answer(server, sent, adapter)


def test_a_pruned_rank_is_remembered_and_asked_for_next() -> None:
    server = serve("hetlora", [4, 4, 2, 6], options={"rank_decay": 0.5})
    assert dict(server.state.ranks) == {0: 4, 1: 4, 2: 2, 3: 6}
    shorter = pruned(server, 0, 2)
    sent = server.plan()
    assert server.accept(shorter) == ""
    assert server.accept(train(server, sent[1])) == ""
    # One that does not count does not prune either.
    assert server.accept(spoilt(pruned(serve("hetlora", [4, 4, 2, 6]), 3, 3), math.nan)) != ""
    record = server.commit()
    assert [c.rank for c in record.clients] == [4, 4, 2, 6]
    assert dict(server.state.ranks) == {0: 2, 1: 4, 2: 2, 3: 6}
    sent = server.plan()
    assert {k: b.rank for k, b in sent.items()} == {0: 2, 1: 4, 2: 2, 3: 6}
    for k, broadcast in sent.items():
        start = start_of(server, broadcast).adapter
        assert {x.rank for x in start.values()} == {server.state.ranks[k]}
        assert {x.rank for x in broadcast.adapter.values()} == {server.state.ranks[k]}
    # It can shrink further, and does not grow back.
    with pytest.raises(ValueError, match="shapes or ranks other than those asked for"):
        server.accept(replace(shorter, round=2, adapter=random_adapter(4, 1)))
    assert server.accept(replace(shorter, round=2, adapter=random_adapter(1, 1))) == ""
    server.commit()
    assert server.plan()[0].rank == 1
    # Whoever goes on from the state goes on with the rank.
    again = Server(server.federation, server.state, Mean())
    assert again.plan()[0].rank == 1


@pytest.mark.parametrize("rank", [2, 4])
def test_a_pruned_update_counts_with_the_directions_it_has(rank: int) -> None:
    server = serve("hetlora", [4, 4], given=random_adapter(4, 1))
    mine = pruned(server, 0, rank)
    sent = server.plan()
    other = train(server, sent[1])
    before = server.state.adapter["wide"]
    assert isinstance(before, LowRank)
    for update in (mine, other):
        server.accept(update)
    server.commit()
    x = server.state.adapter["wide"]
    assert isinstance(x, LowRank)
    assert x.rank == 4
    one, two = mine.adapter["wide"], other.adapter["wide"]
    v, w = (u.num_examples * float((f.B @ f.A).norm()) for u, f in ((mine, one), (other, two)))
    a, b = torch.zeros_like(two.A), torch.zeros_like(two.B)
    a[:rank], b[:, :rank] = one.A, one.B
    torch.testing.assert_close(x.A, (v * a + w * two.A) / (v + w))
    torch.testing.assert_close(x.B, (v * b + w * two.B) / (v + w))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_only_a_rule_that_prunes_takes_another_rank(method: str, decay: float) -> None:
    options = {"rank_decay": decay} if method == "hetlora" else {}
    server = serve(method, options=options)
    update = pruned(server, 0, 2)
    if method == "hetlora" and decay < 1.0:
        assert server.accept(update) == ""
    else:
        with pytest.raises(ValueError, match="shapes or ranks other than those asked for"):
            server.accept(update)


def test_a_round_is_recorded_client_by_client() -> None:
    server = serve("exact", [2, 4, 1, 3])
    for k, sent in server.plan().items():
        server.accept(replace(train(server, sent), metrics={"loss": float(k)}))
    record = server.commit()
    assert record.round == server.state.round == 1
    assert [c.rank for c in record.clients] == [2, 4, 1, 3]
    assert [c.num_examples for c in record.clients] == [10, 17, 24, 31]
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

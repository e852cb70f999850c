"""Leading directions of a large dense update, starts that are subtracted, sums in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.federation import aggregation_error
from fedlora.federation.aggregation_error import measure_change
from fedlora.federation.aggregators.mean import Mean, ProductSum
from fedlora.federation.codec import as_new
from fedlora.federation.exchange import Agreement, client_start
from fedlora.federation.messages import ClientUpdate
from fedlora.federation.participants import Federation
from fedlora.federation.server import Server, initial_state
from fedlora.lowrank import (
    Delta,
    Dense,
    LowRank,
    add,
    balance,
    concat,
    decomposition,
    leading,
    merge_equal_rows,
    norm,
    prefix,
    refactor,
    scale,
    to_dense,
)
from fedlora.methods import METHODS
from fedlora.methods.values import ServerState
from fedlora.threads import map_modules, one_thread

M, N, RANK = 260, 210, 6  # 4 * (6 + 32) < 210: large enough not to be decomposed


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(values: Tensor, dtype: torch.dtype) -> Tensor:
    left, right = (torch.linalg.qr(random(size, N, seed=size)).Q for size in (M, N))
    return ((left * values.double()) @ right.T).to(dtype)


STEPS = torch.arange(N, dtype=torch.float64)


SPECTRA = {
    "flat": torch.ones(N),
    "falling": torch.exp(-STEPS / 5),
    "slow": (STEPS + 1) ** -0.5,
    "a cluster across the cut": torch.where(STEPS < 9, 1.0, 0.3),
    "a cluster after the cut": torch.where(STEPS < 6, 1.0, 0.9),
    "a step inside": torch.where(STEPS < 2, 1e3, 1.0),
    "deficient": torch.where(STEPS < 3, 1.0, 0.0),
    "tiny": 1e-20 * torch.exp(-STEPS / 20),
    "huge": 1e15 * torch.exp(-STEPS / 20),
    "linear": 1 - STEPS / N,
    "zero": torch.zeros(N),
}


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[Delta]:
    """The dense updates that were decomposed as a whole."""
    seen: list[Delta] = []

    def watched(x: Delta) -> LowRank:
        if isinstance(x, Dense):
            seen.append(x)
        return refactor(x)

    monkeypatch.setattr(decomposition, "refactor", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_leading_directions_hold_as_much_as_the_true_ones(
    spectrum: str, dtype: torch.dtype
) -> None:
    matrix = with_spectrum(SPECTRA[spectrum], dtype)
    found = leading(Dense(matrix), RANK)
    assert (found.rank, found.A.dtype) == (RANK, dtype)
    values = torch.linalg.svdvals(matrix.double())[:RANK]
    best, exact = float(values.norm()), 1e-5 if dtype == torch.float32 else 1e-9
    rows = found.A.double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(RANK, dtype=rows.dtype), atol=1e-5, rtol=0)
    columns = found.B.double().norm(dim=0)
    assert bool((columns[:-1] >= columns[1:] * (1 - 1e-5)).all()), "the largest first"
    # Captured energy, and the form of `refactor`: B is what S makes of the directions.
    assert float((matrix.double() @ rows.T).norm()) >= (1 - 1e-3) * best
    assert float(columns.norm()) >= (1 - 1e-3) * best
    assert float(columns.norm()) <= (1 + exact) * best
    assert bool((columns <= values * (1 + exact) + exact * best).all())


@pytest.mark.parametrize("spectrum", ["falling", "a step inside", "deficient"])
def test_where_there_is_a_gap_they_are_the_singular_directions(spectrum: str) -> None:
    """The sine of the angle between subspaces is the residual over the gap."""
    matrix = with_spectrum(SPECTRA[spectrum], torch.float64)
    rank = {"falling": RANK, "a step inside": 2, "deficient": 3}[spectrum]
    found = leading(Dense(matrix), rank)
    _, values, right = torch.linalg.svd(matrix)
    cosines = torch.linalg.svdvals(right[:rank] @ found.A.T)
    assert float(cosines.min()) > 1 - 1e-3
    torch.testing.assert_close(found.B.norm(dim=0), values[:rank], rtol=1e-3, atol=0)


def test_nothing_is_decomposed_as_a_whole_unless_it_has_to_be(decomposed: list[Delta]) -> None:
    leading(Dense(with_spectrum(SPECTRA["falling"], torch.float32)), RANK)
    assert decomposed == []
    matrix = Dense(with_spectrum(SPECTRA["a cluster after the cut"], torch.float64))
    small = Dense(matrix.W[:, :40])
    leading(small, RANK)
    assert decomposed == [small]


@pytest.mark.parametrize("sweeps", [0, 1])
def test_what_does_not_converge_is_decomposed(
    sweeps: int, decomposed: list[Delta], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decomposition, "_SWEEPS", sweeps)
    matrix = Dense(with_spectrum(SPECTRA["linear"], torch.float64))
    found = leading(matrix, RANK)
    assert decomposed == [matrix]
    wanted = prefix(refactor(matrix), RANK)
    assert torch.equal(found.A, wanted.A)
    assert torch.equal(found.B, wanted.B)


def test_the_same_directions_every_time_and_no_draw_is_used_up() -> None:
    matrix = Dense(with_spectrum(SPECTRA["slow"], torch.float32))
    torch.manual_seed(5)
    first = leading(matrix, RANK)
    told = torch.rand(1)
    torch.manual_seed(6)
    again = leading(Dense(matrix.W.clone()), RANK)
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), told)


def test_leading_directions_of_factors_are_those_of_refactor() -> None:
    x = LowRank(random(9, N, seed=1), random(M, 9, seed=2))
    found, wanted = leading(x, 4), prefix(refactor(x), 4)
    assert torch.equal(found.A, wanted.A)
    assert torch.equal(found.B, wanted.B)
    assert leading(x, 40).rank == 9


def test_gathered_keeps_the_matrix_and_holds_equal_rows_once() -> None:
    a, b = random(5, 20, seed=1), random(30, 5, seed=2)
    again = LowRank(torch.cat([a, a[:3], a[4:]]), torch.cat([b, 2 * b[:, :3], -b[:, 4:]], dim=1))
    found = merge_equal_rows(again)
    assert found.rank == 4  # the last one cancels
    torch.testing.assert_close(to_dense(found), to_dense(again))
    assert torch.equal(again.B[:, 0], b[:, 0]), "the input was changed"


def test_rows_that_agree_at_their_ends_alone_stay_apart() -> None:
    a = random(1, 30, seed=1)
    other = a.clone()
    other[0, 15] += 1.0
    x = LowRank(torch.cat([a, other, a]), random(4, 3, seed=2))
    assert merge_equal_rows(x).rank == 2
    torch.testing.assert_close(to_dense(merge_equal_rows(x)), to_dense(x))


def test_what_is_different_everywhere_is_given_back_as_it_is() -> None:
    x = LowRank(random(3, 20, seed=1), random(7, 3, seed=2))
    assert merge_equal_rows(x) is x
    empty = LowRank(x.A[:0], x.B[:, :0])
    assert merge_equal_rows(empty).rank == merge_equal_rows(concat([empty, empty])).rank == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [7, 64, 1000])
def test_a_direction_is_balanced_the_same_way_whatever_stands_beside_it(
    size: int, dtype: torch.dtype
) -> None:
    x = refactor(LowRank(random(48, size, seed=1, dtype=dtype), random(size, 48, dtype=dtype)))
    whole = balance(x)
    for rank in (1, 3, 6, 12, 24, 47):
        part = balance(prefix(x, rank))
        assert torch.equal(part.A, prefix(whole, rank).A)
        assert torch.equal(part.B, prefix(whole, rank).B)


def large(method: str, ranks: list[int], shapes: dict[str, tuple[int, int]]) -> Server:
    rule = METHODS[method]
    agreement = Agreement(rule, rule.options(), shapes)
    federation = Federation(ranks, [3 + k for k in range(len(ranks))], agreement)
    return Server(federation, initial_state(federation), Mean())


def one_round(server: Server, seed: int = 0) -> None:
    spec = server.federation
    for k, sent in server.plan().items():
        start = client_start(sent, server.agreement)
        ended = {
            n: LowRank(
                x.A + random(*x.A.shape, seed=9 * k + seed, dtype=torch.float32),
                x.B + random(*x.B.shape, seed=99 * k + seed, dtype=torch.float32),
            )
            for n, x in start.adapter.items()
        }
        server.accept(ClientUpdate(k, sent.round, ended, spec.num_examples[k]))


@pytest.mark.parametrize("method", ["exact", "fedmomentum"])
def test_starts_that_are_subtracted_add_no_direction(method: str) -> None:
    """Before anything is decomposed the sum has what was trained and one copy of the starts."""
    server = large(method, [8, 4, 2, 2], {"layer": (300, 200)})
    for round in range(1, 4):
        one_round(server, round)
        starts = {1: 0}.get(round, 6 if method == "exact" else 8)
        summed = server.aggregator.products["layer"]._factors
        assert merge_equal_rows(concat(summed)).rank <= 16 + starts
        server.commit()
        held = server.state.adapter["layer"].rank
        # Where all clients start from a direction of S, theirs take its place.
        assert 14 * round <= held <= 16 * round if method == "exact" else held == 8


def test_exact_finds_leading_directions_that_were_not_followed(
    decomposed: list[Delta],
) -> None:
    server = large("exact", [4, 2], {"layer": (M, N)})
    part = with_spectrum(SPECTRA["falling"], torch.float32)
    server.state = ServerState(
        round=3,
        adapter={"layer": Dense(part.contiguous())},
        ranks={0: 4, 1: 2},
    )
    whole = server.state.adapter["layer"]
    sent = server.plan()
    assert decomposed == []
    assert sent[0].adapter["layer"] is whole
    assert {k: b.leading["layer"].rank for k, b in sent.items()} == {0: 3, 1: 2}
    assert sent[0].leading["layer"].rank == 3
    one_round(server)
    error = server.commit().aggregation_error
    assert error is not None
    assert error < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_total_is_the_weighted_sum_in_the_smaller_form(dtype: torch.dtype) -> None:
    total, wanted = ProductSum(), torch.zeros(20, 30, dtype=torch.float64)
    for k in range(9):
        x: Delta = LowRank(
            random(3, 30, seed=k, dtype=dtype), random(20, 3, seed=50 + k, dtype=dtype)
        )
        if k == 7:
            x = Dense(random(20, 30, seed=k, dtype=dtype))
        before = to_dense(x).clone()
        total.add(x, 0.1 * (k + 1))
        assert torch.equal(to_dense(x), before)
        wanted += 0.1 * (k + 1) * before.double()
        found = total.value()
        assert isinstance(found, Dense) == (k > 3 or 3 * (k + 1) * 50 > 600)
        torch.testing.assert_close(to_dense(found).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_total_begins_with_a_matrix_and_goes_on_in_float64() -> None:
    first, second = Dense(random(4, 5, dtype=torch.float32)), LowRank(random(1, 5), random(4, 1))
    total = ProductSum()
    total.add(first, 2.0)
    total.add(second, 0.5)
    found = to_dense(total.value())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, 2 * first.W.double() + 0.5 * second.B @ second.A)
    torch.testing.assert_close(first.W, random(4, 5, dtype=torch.float32))


@pytest.mark.parametrize("begin", ["factors", "matrix"])
def test_terms_of_different_shapes_are_refused(begin: str) -> None:
    total = ProductSum()
    total.add(
        Dense(random(4, 5)) if begin == "matrix" else LowRank(random(1, 5), random(4, 1)), 1.0
    )
    for other in (Dense(random(5, 4)), LowRank(random(1, 4), random(5, 1))):
        with pytest.raises(ValueError, match="shapes"):
            total.add(other, 1.0)


@pytest.mark.parametrize("form", ["factors", "estimated", "matrices", "mixed"])
def test_the_change_of_the_global_model_is_measured(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation_error, "_ROW_BLOCK", 1000)
    if form == "estimated":
        monkeypatch.setattr(aggregation_error, "MEASURED_RANK", 0)

    def factors(seed: int) -> Delta:
        return LowRank(random(4, 90, seed=seed), random(110, 4, seed=seed + 1))

    def either(seed: int, dense: bool) -> Delta:
        return Dense(to_dense(factors(seed))) if dense else factors(seed)

    names = [f"layer{i}" for i in range(8)]
    dense = form == "matrices"
    base = {n: either(i, dense) for i, n in enumerate(names)}
    old = {n: either(10 + i, dense) for i, n in enumerate(names)}
    new = {
        n: either(20 + i, dense or (form == "mixed" and i % 2 == 0)) for i, n in enumerate(names)
    }
    merge = {n: either(30 + i, dense) for i, n in enumerate(names[:6])}
    wanted = {n: either(40 + i, dense) for i, n in enumerate(names[:7])}
    before = ServerState(1, old, base)
    merged = {**base, **{n: add([base[n], x]) for n, x in merge.items()}}
    after = ServerState(2, new, merged, last_merge=merge)
    found = measure_change(before, after, wanted).total
    change = [
        add([new[n], scale(old[n], -1.0), *([merge[n]] if n in merge else [])]) for n in names
    ]
    gap = [
        add([x, scale(wanted[n], -1.0)]) if n in wanted else x
        for n, x in zip(names, change, strict=True)
    ]
    close = 0.1 if form == "estimated" else 1e-6
    for told, deltas in (
        (found.size, change),
        (found.wanted, [*wanted.values()]),
        (found.missed, gap),
    ):
        assert told == pytest.approx(sum(norm(x) ** 2 for x in deltas) ** 0.5, rel=close)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit_and_their_number_is_kept(threads: int) -> None:
    modules = {f"m{i}": LowRank(random(9, 50, seed=i), random(60, 9, seed=i + 9)) for i in range(7)}
    wanted = {name: refactor(x) for name, x in modules.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with one_thread():
            found = map_modules(refactor, modules)
        outside = map_modules(refactor, modules)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for told in (found, outside):
        assert list(told) == list(modules)
        assert all(
            torch.equal(told[n].A, x.A) and torch.equal(told[n].B, x.B) for n, x in wanted.items()
        )
    assert map_modules(refactor, {}) == {}


def test_what_is_broadcast_lies_in_memory_as_what_has_travelled() -> None:
    """And once for all clients, also where the state's own tensors are parts of larger ones."""
    server = large("exact", [4, 2], {"layer": (180, 170), "small": (180, 170)})
    part = with_spectrum(SPECTRA["falling"], torch.float32)
    factors = LowRank(part[:6, :170], part[:180, 7:13])
    server.state = ServerState(
        round=3,
        adapter={"layer": Dense(part[:180, :170]), "small": factors},
        base_delta={"layer": Dense(part[20:200, :170])},
        ranks={0: 4, 1: 2},
    )
    sent = server.plan()
    for broadcast in sent.values():
        parts = (broadcast.adapter, broadcast.leading, broadcast.base_delta)
        for x in (x for deltas in parts for x in deltas.values()):
            for tensor in (x.W,) if isinstance(x, Dense) else (x.A, x.B):
                assert as_new(tensor) is tensor
    assert sent[0].base_delta is sent[1].base_delta
    assert sent[0].adapter is sent[1].adapter  # so that clients share a pass over it
    torch.testing.assert_close(to_dense(sent[0].adapter["small"]), to_dense(factors))

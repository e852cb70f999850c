"""The algebra of low-rank updates against dense float64 matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.lowrank import (
    Delta,
    Dense,
    LowRank,
    add,
    add_all,
    balance,
    drop_null_directions,
    inner,
    nbytes,
    norm,
    prefix,
    refactor,
    scale,
    scale_all,
    scaling,
    subtract,
    suffix,
    to_dense,
    total_norm,
    truncate,
)
from fedlora.threads import one_thread

law = settings(max_examples=25, deadline=None, derandomize=True)


# Relative to the norms of the factors: what near-cancelling terms lose is not an error.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}


sizes = st.integers(1, 8)


# Up to beyond both dimensions, and none at all.
ranks = st.integers(0, 10)


seeds = st.integers(0, 2**32 - 1)


dtypes = st.sampled_from([torch.float32, torch.float64])


# alpha / r and alpha / sqrt(r) of ordinary configurations, small and large.
scales = st.sampled_from([1e-3, 0.25, 1.0, 2.0, 64.0])


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def groups(
    draw: st.DrawFn, least: int = 1, most: int = 4, forms: st.SearchStrategy[bool] | None = None
) -> list[Delta]:
    """Updates of one shape and dtype, as factors or dense, of any rank and scale."""
    m, n, dtype = draw(sizes), draw(sizes), draw(dtypes)
    out: list[Delta] = []
    for _ in range(draw(st.integers(least, most))):
        seed, factor = draw(seeds), draw(scales)
        if draw(st.booleans() if forms is None else forms):
            out.append(Dense(random(m, n, seed=seed, dtype=dtype) * factor))
        else:
            rank = draw(ranks)
            both = random(m + n, rank, seed=seed, dtype=dtype)
            out.append(LowRank(both[m:].T, both[:m] * factor))
    return out


updates = groups(1, 1).map(lambda found: found[0])


factor_updates = groups(1, 1, st.just(False)).map(lambda found: found[0])


def exactly(x: Delta) -> Tensor:
    """The matrix in float64, by none of the functions under test."""
    return x.W.double() if isinstance(x, Dense) else x.B.double() @ x.A.double()


def size(*terms: Delta) -> float:
    """The sum of the terms' norms, factors apart: what tolerances are relative to."""
    return sum(
        float(x.W.double().norm())
        if isinstance(x, Dense)
        else float(x.B.double().norm() * x.A.double().norm())
        for x in terms
    )


def dtype_of(x: Delta) -> torch.dtype:
    return x.W.dtype if isinstance(x, Dense) else x.A.dtype


def assert_close(got: Delta | Tensor, wanted: Tensor, relative_to: float, tolerance: float) -> None:
    found = got.double() if isinstance(got, Tensor) else exactly(got)
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= tolerance * relative_to


def tensors(terms: Sequence[Delta]) -> list[Tensor]:
    return [t for x in terms for t in ([x.W] if isinstance(x, Dense) else [x.A, x.B])]


@law
@given(groups())
def test_add_is_the_sum_of_matrices(terms: list[Delta]) -> None:
    total = add(terms)
    assert_close(total, sum(map(exactly, terms)), size(*terms), TOLERANCE[dtype_of(terms[0])])
    assert dtype_of(total) == dtype_of(terms[0])


@law
@given(groups())
def test_add_never_holds_more_numbers_than_the_matrix(terms: list[Delta]) -> None:
    m, n = terms[0].shape
    total = add(terms)
    if isinstance(total, LowRank):
        assert total.rank == sum(x.rank for x in terms)
        assert total.rank * (m + n) <= m * n
    else:
        dense = any(isinstance(x, Dense) for x in terms)
        assert dense or sum(x.rank for x in terms) * (m + n) > m * n


@law
@given(updates, st.sampled_from([-3.0, -1.0, 0.0, 1 / 3, 1e3]))
def test_scale_multiplies_the_matrix(x: Delta, factor: float) -> None:
    scaled = scale(x, factor)
    assert type(scaled) is type(x)
    assert_close(scaled, factor * exactly(x), abs(factor) * size(x), TOLERANCE[dtype_of(x)])


@law
@given(groups(2, 2))
def test_subtract_is_the_difference(terms: list[Delta]) -> None:
    x, y = terms
    tolerance = TOLERANCE[dtype_of(x)]
    assert_close(subtract(x, y), exactly(x) - exactly(y), size(x, y), tolerance)
    assert_close(subtract(x, x), torch.zeros(x.shape, dtype=torch.float64), size(x), tolerance)


@law
@given(updates)
def test_to_dense_is_the_product(x: Delta) -> None:
    assert_close(to_dense(x), exactly(x), size(x), TOLERANCE[dtype_of(x)])
    assert to_dense(x).dtype == dtype_of(x)


@law
@given(groups(2, 2))
def test_inner_is_that_of_the_matrices_in_float64(terms: list[Delta]) -> None:
    x, y = terms
    # float64 throughout, whatever the inputs.
    tolerance = 1e-13 * size(x) * size(y)
    assert abs(inner(x, y) - float((exactly(x) * exactly(y)).sum())) <= tolerance
    assert abs(inner(x, y) - inner(y, x)) <= tolerance


@law
@given(updates)
def test_norm_is_that_of_the_matrix(x: Delta) -> None:
    assert abs(norm(x) - float(exactly(x).norm())) <= 2e-8 * size(x)


@law
@given(factor_updates, st.sampled_from([0.0, 1e-12, 1e-6, 1e-3]))
def test_norm_of_what_nearly_cancels_is_right_relative_to_the_factors(
    x: Delta, nearly: float
) -> None:
    assert isinstance(x, LowRank)
    # Concatenated by hand, since add would hold a small matrix densely, where nothing cancels.
    A, B = x.A.double(), x.B.double()
    left = LowRank(torch.cat([A, A]), torch.cat([B, -(1 - nearly) * B], 1))
    found = norm(left)
    assert math.isfinite(found)
    assert abs(found - nearly * float((B @ A).norm())) <= 3e-8 * size(left)


@law
@given(groups(1, 4))
def test_total_norm_is_over_all_modules(terms: list[Delta]) -> None:
    named = {str(i): x for i, x in enumerate(terms)}
    wanted = math.sqrt(sum(float(exactly(x).square().sum()) for x in terms))
    assert abs(total_norm(named) - wanted) <= 2e-8 * size(*terms)


def values_of(x: Delta) -> Tensor:
    return torch.linalg.svdvals(exactly(x))


@law
@given(updates)
def test_refactor_is_the_singular_value_decomposition(x: Delta) -> None:
    tolerance = TOLERANCE[dtype_of(x)]
    found = refactor(x)
    assert_close(found, exactly(x), size(x), tolerance)
    assert found.rank == min(x.rank, *x.shape)
    assert found.A.dtype == dtype_of(x)
    orthonormal = torch.eye(found.rank, dtype=torch.float64)
    gram = found.A.double() @ found.A.double().T
    assert float((gram - orthonormal).norm()) <= tolerance
    lengths = found.B.double().norm(dim=0)
    assert float((lengths - values_of(x)[: found.rank]).norm()) <= tolerance * size(x)
    assert bool((lengths[1:] <= lengths[:-1] + tolerance * size(x)).all())
    # The columns of B are orthogonal too: B = U diag(s).
    beside = found.B.double().T @ found.B.double() - torch.diag(lengths.square())
    assert float(beside.norm()) <= tolerance * size(x) ** 2


@law
@given(updates)
def test_compact_keeps_the_matrix_in_the_smaller_form(x: Delta) -> None:
    m, n = x.shape
    found = drop_null_directions(x)
    assert_close(found, exactly(x), size(x), TOLERANCE[dtype_of(x)])
    dense = isinstance(x, Dense) or x.rank * (m + n) > m * n
    assert isinstance(found, Dense) == dense
    if isinstance(found, LowRank):
        assert found.rank <= min(x.rank, m, n)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compact_drops_directions_that_are_zero(dtype: torch.dtype) -> None:
    a, b = random(2, 20, seed=1, dtype=dtype), random(20, 2, seed=2, dtype=dtype)
    zero = LowRank(torch.cat([a, a]), torch.cat([b, 0 * b], 1))
    kept = drop_null_directions(zero)
    assert isinstance(kept, LowRank)
    assert kept.rank == 2
    assert drop_null_directions(LowRank(a, 0 * b)).rank == 0


@law
@given(factor_updates, st.integers(0, 12))
def test_prefix_and_suffix_divide_the_directions(x: Delta, rank: int) -> None:
    assert isinstance(x, LowRank)
    first, others = prefix(x, rank), suffix(x, rank)
    assert first.rank == min(rank, x.rank)
    assert first.rank + others.rank == x.rank
    assert torch.equal(torch.cat([first.A, others.A]), x.A)
    assert torch.equal(torch.cat([first.B, others.B], 1), x.B)


def relative_error(x: Delta, kept: LowRank) -> float:
    whole = exactly(x)
    return float((whole - exactly(kept)).norm() / whole.norm())


def well_conditioned(x: Delta) -> bool:
    """Not so near zero beside its factors that the relative error of the matrix is noise."""
    return float(exactly(x).norm()) > 1e-3 * size(x) > 0


@law
@given(updates, st.integers(1, 10))
def test_truncate_by_rank_is_the_best_approximation(x: Delta, rank: int) -> None:
    assume(well_conditioned(x))
    kept, error = truncate(x, rank=rank)
    values = values_of(x)
    assert kept.rank == min(rank, x.rank, *x.shape)
    best = float(values[rank:].norm() / values.norm())
    tolerance = 1e3 * TOLERANCE[dtype_of(x)]
    assert relative_error(x, kept) == pytest.approx(best, abs=tolerance)
    assert error == pytest.approx(best, abs=tolerance)


@law
@given(updates, st.floats(0.01, 1.0))
def test_truncate_by_energy_keeps_the_fewest_directions(x: Delta, energy: float) -> None:
    assume(well_conditioned(x))
    kept, error = truncate(x, energy=energy)
    tolerance = 1e3 * TOLERANCE[dtype_of(x)]
    shares = values_of(x).square().cumsum(0)
    shares = shares / shares[-1]
    assert kept.rank >= 1
    assert float(shares[kept.rank - 1]) >= energy - tolerance
    if kept.rank > 1 and energy < 1:
        assert float(shares[kept.rank - 2]) < energy + tolerance
    assert error == pytest.approx(relative_error(x, kept), abs=tolerance)
    assert error**2 <= 1 - energy + tolerance


def test_truncate_by_energy_on_known_singular_values() -> None:
    x = LowRank(torch.eye(4, 6), torch.eye(5, 4) * torch.tensor([4.0, 2.0, 2.0, 1.0]))
    # Squares 16, 4, 4, 1 of 25.
    for energy, rank in [(0.5, 1), (0.64, 1), (0.65, 2), (0.8, 2), (0.9, 3), (0.97, 4), (1.0, 4)]:
        kept, error = truncate(x, energy=energy)
        assert kept.rank == rank
        assert error == pytest.approx(math.sqrt((0, 9, 5, 1, 0)[rank] / 25), abs=1e-6)


def test_an_update_of_rank_zero_is_zero_everywhere() -> None:
    x = LowRank(torch.zeros(0, 4), torch.zeros(3, 0))
    y = LowRank(random(1, 4, seed=1), random(3, 1, seed=2))
    assert torch.equal(to_dense(x), torch.zeros(3, 4))
    assert norm(x) == inner(x, y) == inner(y, x) == 0.0
    assert inner(x, Dense(torch.ones(3, 4))) == 0.0
    for changed in (scale(x, 3.0), refactor(x), drop_null_directions(x), add([x, x])):
        assert changed.rank == 0
    assert torch.allclose(exactly(add([x, y])), exactly(y))
    assert torch.allclose(exactly(subtract(x, y)), -exactly(y))
    for kept, error in (truncate(x, rank=2), truncate(x, energy=0.9), truncate(x, energy=1.0)):
        assert (kept.rank, error) == (0, 0.0)


@pytest.mark.parametrize("energy", [0.5, 1.0])
def test_truncating_a_zero_matrix_causes_no_error(energy: float) -> None:
    zero = LowRank(random(2, 4, seed=1), torch.zeros(3, 2, dtype=torch.float64))
    for x in (zero, Dense(torch.zeros(3, 4))):
        for kept, error in (truncate(x, energy=energy), truncate(x, rank=1)):
            assert error == 0.0
            assert float(exactly(kept).norm()) == 0.0


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("beyond", [0, 1, 9])
def test_ranks_up_to_and_beyond_a_dimension(shape: tuple[int, int], beyond: int) -> None:
    m, n = shape
    rank = min(shape) + beyond
    x = LowRank(random(rank, n, seed=1), random(m, rank, seed=2))
    assert_close(refactor(x), exactly(x), size(x), 1e-12)
    assert refactor(x).rank == min(shape)
    assert isinstance(drop_null_directions(x), Dense)
    assert_close(add([x, x]), 2 * exactly(x), size(x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_any_arithmetic(dtype: torch.dtype) -> None:
    x = LowRank(random(2, 9, seed=1).to(dtype), random(7, 2, seed=2).to(dtype))
    d = Dense(random(7, 9, seed=3).to(dtype))
    made: list[tuple[Delta, Tensor]] = [
        (add([x, x]), 2 * exactly(x)),
        (add([x, d]), exactly(x) + exactly(d)),
        (add([d, x]), exactly(x) + exactly(d)),
        (add([d, d]), 2 * exactly(d)),
        (subtract(x, d), exactly(x) - exactly(d)),
        (scale(x, 1 / 3), exactly(x) / 3),
        (scale(d, 1 / 3), exactly(d) / 3),
        (refactor(x), exactly(x)),
        (refactor(d), exactly(d)),
        (drop_null_directions(x), exactly(x)),
        (Dense(to_dense(x)), exactly(x)),
        (truncate(x, rank=2)[0], exactly(x)),
    ]
    for got, wanted in made:
        assert {t.dtype for t in tensors([got])} == {torch.float32}
        assert_close(got, wanted, size(x, d), TOLERANCE[torch.float32])
    assert inner(x, d) == pytest.approx(float((exactly(x) * exactly(d)).sum()), abs=1e-12)
    assert norm(x) == pytest.approx(float(exactly(x).norm()), abs=1e-12)


@law
@given(groups(2, 2), st.booleans())
def test_a_sum_of_float32_and_float64_is_float64(terms: list[Delta], swap: bool) -> None:
    narrow = [
        Dense(x.W.float()) if isinstance(x, Dense) else LowRank(x.A.float(), x.B.float())
        for x in terms[:1]
    ]
    wide = [
        Dense(x.W.double()) if isinstance(x, Dense) else LowRank(x.A.double(), x.B.double())
        for x in terms[1:]
    ]
    mixed = [*wide, *narrow] if swap else [*narrow, *wide]
    total = add(mixed)
    assert dtype_of(total) == torch.float64
    # The product of float32 factors may still be formed in float32.
    relative = TOLERANCE[torch.float32] * size(*narrow) + TOLERANCE[torch.float64] * size(*wide)
    assert_close(total, sum(map(exactly, mixed)), relative, 1.0)


@law
@given(groups(2, 2))
def test_no_function_changes_its_inputs(terms: list[Delta]) -> None:
    x, y = terms
    before = [t.clone() for t in tensors(terms)]
    calls: list[Callable[[], object]] = [
        lambda: add([x, y]),
        lambda: add([x, y, x]),
        lambda: subtract(x, y),
        lambda: scale(x, 2.0),
        lambda: inner(x, y),
        lambda: norm(x),
        lambda: to_dense(x),
        lambda: refactor(x),
        lambda: drop_null_directions(x),
        lambda: truncate(x, rank=1),
        lambda: truncate(x, energy=0.5),
        lambda: add_all([{"a": x}, {"a": y}]),
        lambda: scale_all({"a": x}, 2.0),
    ]
    for call in calls:
        call()
    assert all(torch.equal(t, b) for t, b in zip(tensors(terms), before, strict=True))


@law
@given(groups(3, 3), st.sampled_from([-1.0, 0.5]))
def test_sums_and_multiples_go_module_by_module(terms: list[Delta], factor: float) -> None:
    x, y, z = terms
    total = add_all([{"a": x}, {"b": y, "a": z}])
    tolerance = TOLERANCE[dtype_of(x)]
    assert set(total) == {"a", "b"}
    assert_close(total["a"], exactly(x) + exactly(z), size(x, z), tolerance)
    assert_close(total["b"], exactly(y), size(y), tolerance)
    scaled = scale_all({"a": x, "b": y}, factor)
    assert_close(scaled["a"], factor * exactly(x), size(x), tolerance)
    assert_close(scaled["b"], factor * exactly(y), size(y), tolerance)
    assert add_all([]) == add_all([{}, {}]) == {}


def test_nbytes_counts_every_number_once() -> None:
    x = LowRank(torch.zeros(2, 5), torch.zeros(3, 2))
    d = Dense(torch.zeros(3, 5, dtype=torch.float64))
    assert (x.nbytes, d.nbytes) == ((10 + 6) * 4, 15 * 8)
    assert nbytes({"x": x, "d": d}) == x.nbytes + d.nbytes
    # Views count what they show, not what they are cut from.
    assert prefix(x, 1).nbytes == (5 + 3) * 4


def test_shape_and_rank() -> None:
    x = LowRank(torch.zeros(2, 5), torch.zeros(3, 2))
    assert (x.shape, x.rank) == ((3, 5), 2)
    assert (Dense(torch.zeros(3, 5)).shape, Dense(torch.zeros(3, 5)).rank) == ((3, 5), 3)


@pytest.mark.parametrize(
    ("a", "b"), [((2, 5), (3, 3)), ((5,), (3, 2)), ((2, 5), (3,)), ((1, 2, 5), (3, 2))]
)
def test_factors_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        LowRank(torch.zeros(a), torch.zeros(b))


def test_sums_of_nothing_or_of_different_shapes_are_refused() -> None:
    x, y = LowRank(torch.zeros(1, 4), torch.zeros(3, 1)), Dense(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least one"):
        add([])
    for terms in ([x, y], [y, x]):
        with pytest.raises(ValueError, match="shapes"):
            add(terms)
    with pytest.raises(ValueError, match="shapes"):
        subtract(x, y)


@pytest.mark.parametrize(
    "how",
    [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"rank": -1}]
    + [{"energy": energy} for energy in (0.0, -0.1, 1.1, math.nan)],
)
def test_truncate_refuses_what_it_cannot_do(how: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rank|energy"):
        truncate(Dense(torch.ones(2, 3)), **how)


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_restores_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == threads
        with pytest.raises(RuntimeError, match="inside"), one_thread():
            raise RuntimeError("inside")
        assert torch.get_num_threads() == threads
        refactor(Dense(torch.ones(2, 3)))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balance_keeps_the_product_and_evens_the_factors(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(4, 7, generator=generator, dtype=dtype)
    b = 50 * torch.randn(5, 4, generator=generator, dtype=dtype)
    b[:, 2] = 0  # a fresh direction stays as it is
    x = LowRank(a, b)
    even = balance(x)
    torch.testing.assert_close(to_dense(even), to_dense(x))
    used = [0, 1, 3]
    torch.testing.assert_close(even.A.norm(dim=1)[used], even.B.norm(dim=0)[used])
    assert torch.equal(even.A[2], a[2])
    assert torch.equal(x.A, a)
    assert balance(LowRank(a[:0], b[:, :0])).rank == 0


def test_scaling() -> None:
    assert scaling(16, 8, False) == 2.0
    assert scaling(16, 4, True) == 8.0

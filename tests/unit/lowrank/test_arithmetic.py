"""Sums, multiples and norms of low-rank updates against dense float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.lowrank import Delta, Dense, LowRank, to_dense
from fedlora.lowrank.arithmetic import (
    add,
    add_all,
    balance,
    inner,
    norm,
    scale,
    scale_all,
    subtract,
    total_norm,
)
from support.lowrank import (
    TOLERANCE,
    assert_close,
    dtype_of,
    exactly,
    factor_updates,
    groups,
    law,
    size,
    updates,
)


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


def test_sums_of_nothing_or_of_different_shapes_are_refused() -> None:
    x, y = LowRank(torch.zeros(1, 4), torch.zeros(3, 1)), Dense(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least one"):
        add([])
    for terms in ([x, y], [y, x]):
        with pytest.raises(ValueError, match="shapes"):
            add(terms)
    with pytest.raises(ValueError, match="shapes"):
        subtract(x, y)


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

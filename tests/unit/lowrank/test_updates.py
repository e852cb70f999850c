"""Updates as factors and as matrices: their shapes, sizes, directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.lowrank.updates import (
    Delta,
    Dense,
    LowRank,
    nbytes,
    prefix,
    scaling,
    suffix,
    to_dense,
)
from support.lowrank import (
    TOLERANCE,
    assert_close,
    dtype_of,
    exactly,
    factor_updates,
    law,
    size,
    updates,
)


@law
@given(updates)
def test_to_dense_is_the_product(x: Delta) -> None:
    assert_close(to_dense(x), exactly(x), size(x), TOLERANCE[dtype_of(x)])
    assert to_dense(x).dtype == dtype_of(x)


@law
@given(factor_updates, st.integers(0, 12))
def test_prefix_and_suffix_divide_the_directions(x: Delta, rank: int) -> None:
    assert isinstance(x, LowRank)
    first, others = prefix(x, rank), suffix(x, rank)
    assert first.rank == min(rank, x.rank)
    assert first.rank + others.rank == x.rank
    assert torch.equal(torch.cat([first.A, others.A]), x.A)
    assert torch.equal(torch.cat([first.B, others.B], 1), x.B)


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


def test_scaling() -> None:
    assert scaling(16, 8, False) == 2.0
    assert scaling(16, 4, True) == 8.0

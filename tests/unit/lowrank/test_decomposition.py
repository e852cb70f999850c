"""Singular directions of low-rank updates against those of dense float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fedlora.lowrank import Delta, Dense, LowRank, add
from fedlora.lowrank.decomposition import drop_null_directions, refactor, truncate
from fedlora.threads import one_thread
from support.lowrank import TOLERANCE, assert_close, dtype_of, exactly, law, random, size, updates


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

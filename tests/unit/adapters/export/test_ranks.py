"""Ranks: error and energy against dense float64, cutting and padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedlora.adapters.export.ranks import pad, ranks_to_show, relative_distance, spectrum
from fedlora.errors import InputError
from fedlora.lowrank import Dense, LowRank, to_dense, zeros
from support.adapters import random_lowrank

DELTAS = {
    "a": random_lowrank((12, 9), 5, 0, 1.0),
    "b": random_lowrank((7, 20), 3, 1, 0.3),
    "c": random_lowrank((6, 6), 11, 2, 2.0),  # more directions than the matrix has
    "d": zeros((4, 4)),
}


def dense64(x: LowRank) -> Tensor:
    return x.B.double() @ x.A.double()


def by_hand(rank: int) -> float:
    """The relative error at a rank, from whole decompositions in float64."""
    lost = total = 0.0
    for x in DELTAS.values():
        values = torch.linalg.svdvals(dense64(x)) if x.rank else torch.zeros(1)
        lost += float(values[rank:].square().sum())
        total += float(values.square().sum())
    return math.sqrt(lost / total)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6, 40])
def test_the_error_of_a_rank_is_that_of_dense_matrices(rank: int) -> None:
    found = spectrum(DELTAS)
    assert found.rank == 6
    assert found.error(rank) == pytest.approx(by_hand(rank), rel=1e-10, abs=1e-12)
    assert found.cost(rank).energy == pytest.approx(1.0 - by_hand(rank) ** 2)
    cut = found.cut(rank)
    distance = math.sqrt(
        sum(float((dense64(cut[n]) - dense64(x)).square().sum()) for n, x in DELTAS.items())
        / sum(float(dense64(x).square().sum()) for x in DELTAS.values())
    )
    assert distance == pytest.approx(by_hand(rank), abs=1e-6)
    assert relative_distance(cut, DELTAS) == pytest.approx(distance, abs=1e-7)


@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 0.99, 1.0])
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(energy: float) -> None:
    rank = spectrum(DELTAS).rank_for(energy)
    assert 1.0 - by_hand(rank) ** 2 >= energy - 1e-12
    assert rank == 1 or 1.0 - by_hand(rank - 1) ** 2 < energy


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.01, math.nan])
def test_an_impossible_energy_is_refused(energy: float) -> None:
    with pytest.raises(InputError, match="share above 0"):
        spectrum(DELTAS).rank_for(energy)


def test_a_dense_update_and_its_factors_cost_the_same() -> None:
    found = spectrum({"a": Dense(to_dense(DELTAS["a"]))})
    assert found.rank == 5  # what is rounding is dropped
    assert found.error(2) == pytest.approx(spectrum({"a": DELTAS["a"]}).error(2), rel=1e-5)


def test_an_update_of_nothing_has_rank_one_and_no_error() -> None:
    found = spectrum({"d": zeros((4, 4))})
    assert (found.rank, found.error(1), found.total) == (1, 0.0, 0.0)
    assert relative_distance(found.cut(1), {"d": zeros((4, 4))}) == 0.0


def test_directions_are_balanced_between_the_factors() -> None:
    cut = spectrum(DELTAS).cut(4)["a"]
    torch.testing.assert_close(cut.A.norm(dim=1), cut.B.norm(dim=0))
    assert cut.A.dtype == cut.B.dtype == torch.float32


def test_bytes_are_those_of_the_factors_and_of_what_lies_beside_them() -> None:
    found = spectrum(DELTAS)
    sizes = {"a": 21, "b": 27, "c": 12, "d": 8}
    ranks = {"a": 4, "b": 3, "c": 4, "d": 1}
    own = 4 * sum(ranks[name] * size for name, size in sizes.items())
    assert found.cost(4, beside=100).nbytes == own + 100
    assert found.cost(4, padded=True).nbytes == 4 * 4 * sum(sizes.values())


@pytest.mark.parametrize("rank", [3, 5, 30])
def test_padding_adds_zeros_alone(rank: int) -> None:
    x = random_lowrank((5, 4), 3, 0)
    padded = pad(x, rank)
    assert padded.rank == rank
    torch.testing.assert_close(to_dense(padded), to_dense(x), rtol=0, atol=0)
    assert not padded.A[3:].any()
    assert not padded.B[:, 3:].any()


def test_padding_to_less_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 3 to rank 2"):
        pad(random_lowrank((5, 4), 3, 0), 2)


def test_ranks_of_the_table() -> None:
    assert ranks_to_show(300, [24, 512]) == [8, 16, 24, 32, 64, 128, 256, 300]
    assert ranks_to_show(64) == [8, 16, 32, 64]
    assert ranks_to_show(8) == [1, 2, 4, 8]
    assert ranks_to_show(1) == [1]


def test_distances_of_other_modules_are_refused() -> None:
    x = DELTAS["a"]
    assert relative_distance({"a": x}, {"a": x}) < 1e-7
    with pytest.raises(ValueError, match="different modules"):
        relative_distance({"a": x}, {"b": x})

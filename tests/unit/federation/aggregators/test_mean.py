"""The weighted mean of updates, against dense float64."""

from __future__ import annotations

import pytest
import torch

from fedlora.federation.aggregators.mean import Mean, ProductSum
from fedlora.lowrank import Dense, LowRank
from fedlora.methods.values import DENSE, Encoded
from support.adapters import random_lowrank
from support.simulated import matrix


def test_a_sum_is_held_in_the_smaller_form() -> None:
    """Of a 6 x 6 module factors of rank 3 are as many numbers as its matrix."""
    total, by_hand = ProductSum(), torch.zeros(6, 6, dtype=torch.float64)
    for k in range(1, 5):
        term = random_lowrank((6, 6), 1, k)
        total.add(term, float(k))
        by_hand += k * matrix(term)
        value = total.value()
        assert isinstance(value, LowRank if k <= 3 else Dense)
        torch.testing.assert_close(matrix(value), by_hand, rtol=1e-5, atol=1e-6)


def test_a_term_is_never_changed() -> None:
    term = Dense(torch.ones(3, 3))
    total = ProductSum()
    for _ in range(2):
        total.add(term, 2.0)
    assert torch.equal(term.W, torch.ones(3, 3))
    assert torch.equal(matrix(total.value()), torch.full((3, 3), 4.0, dtype=torch.float64))


def test_equal_directions_are_held_once() -> None:
    a = torch.randn(1, 50)
    total = ProductSum()
    for _ in range(40):  # 40 (50 + 50) numbers would be more than a matrix
        total.add(LowRank(a, torch.ones(50, 1)), 1.0)
    value = total.value()
    assert isinstance(value, LowRank)
    assert value.rank == 1
    assert torch.equal(value.B, torch.full((50, 1), 40.0))


def test_the_mean_of_factors_products_and_weights() -> None:
    mean = Mean()
    x = LowRank(torch.ones(1, 2), torch.ones(3, 1))
    for weight, value in ((1.0, 0.0), (3.0, 4.0)):
        tensor = torch.full((2,), value)
        mean.fold(Encoded({"q.A": tensor, f"{DENSE}h": tensor}, {"q": x}, {"q": tensor}), weight)
    assert mean.weight == 4.0
    result = mean.result()
    assert result.factors["q.A"].tolist() == result.weights["q"].tolist() == [3.0, 3.0]
    assert torch.equal(matrix(result.products["q"]), torch.ones(3, 2, dtype=torch.float64))


def test_a_sum_that_is_not_normalised_still_averages_dense_parameters() -> None:
    mean = Mean()
    for _ in range(2):
        mean.fold(Encoded({"q.A": torch.ones(1), f"{DENSE}h": torch.ones(1)}), 3.0)
    result = mean.result(normalised=False)
    assert {name: float(value) for name, value in result.factors.items()} == {
        "q.A": 6.0,
        f"{DENSE}h": 1.0,
    }


def test_a_round_begins_with_nothing() -> None:
    mean = Mean()
    mean.fold(Encoded({"q.A": torch.ones(1)}), 1.0)
    mean.begin()
    assert (mean.weight, mean.factors) == (0.0, {})
    total = ProductSum()
    total.add(random_lowrank((3, 2), 1, 0), 1.0)
    with pytest.raises(ValueError, match=r"cannot add updates of shapes \(3, 2\) and \(2, 3\)"):
        total.add(random_lowrank((2, 3), 1, 0), 1.0)

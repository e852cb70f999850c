"""The server's step: `v' = mu v + total`, and `eta v'` is applied."""

from __future__ import annotations

import torch

from fedlora.federation.server_step import step
from fedlora.lowrank import LowRank
from fedlora.methods.values import Encoded
from support.adapters import random_lowrank
from support.simulated import matrix


def total(value: float, seed: int = 0) -> Encoded:
    """A sum of one factor, one product and one weight."""
    tensor = torch.tensor([value])
    return Encoded({"q.A": tensor}, {"q": random_lowrank((5, 4), 1, seed)}, {"q": tensor})


def test_without_a_step_the_sum_itself_is_applied() -> None:
    now = total(2.0)
    applied, velocity = step(now, Encoded(), 1.0, 0.0)
    assert applied is now
    assert not velocity.factors
    assert not velocity.products


def test_three_rounds_against_the_recursion() -> None:
    velocity, by_hand, matrices = Encoded(), 0.0, torch.zeros(5, 4, dtype=torch.float64)
    for round in range(3):
        now = total(round + 1.0, round)
        applied, velocity = step(now, velocity, 0.5, 0.9)
        by_hand = 0.9 * by_hand + round + 1.0
        matrices = 0.9 * matrices + matrix(now.products["q"])
        torch.testing.assert_close(applied.factors["q.A"], torch.tensor([0.5 * by_hand]))
        torch.testing.assert_close(
            matrix(applied.products["q"]), 0.5 * matrices, rtol=1e-5, atol=1e-6
        )


def test_a_learning_rate_alone_keeps_no_velocity_and_leaves_weights_alone() -> None:
    applied, velocity = step(total(2.0), Encoded(), 0.5, 0.0)
    assert float(applied.factors["q.A"]) == 1.0
    assert float(applied.weights["q"]) == 2.0
    assert not velocity.factors


def test_what_came_to_nothing_is_dropped_from_the_velocity() -> None:
    nothing = Encoded(products={"q": LowRank(torch.ones(1, 4), torch.zeros(5, 1))})
    _, velocity = step(nothing, Encoded(), 1.0, 0.9)
    left = velocity.products["q"]
    assert isinstance(left, LowRank)
    assert left.rank == 0


def test_a_module_that_nobody_trained_goes_on_by_its_momentum() -> None:
    _, velocity = step(total(2.0), Encoded(), 1.0, 0.5)
    applied, _ = step(Encoded(), velocity, 1.0, 0.5)
    assert float(applied.factors["q.A"]) == 1.0
    torch.testing.assert_close(matrix(applied.products["q"]), 0.5 * matrix(velocity.products["q"]))

"""The space of several updates: nothing is lost in it, and nothing decides it but the updates."""

from __future__ import annotations

import pytest
import torch

from fedlora.lowrank import LowRank
from fedlora.lowrank.common_space import common_space
from support.adapters import random_lowrank


@pytest.mark.parametrize("shape", [(11, 7), (6, 13), (5, 5), (40, 30)])
def test_every_update_is_whole_in_it(shape: tuple[int, int]) -> None:
    updates = [random_lowrank(shape, rank, rank) for rank in (4, 0, 2, 6)]
    space = common_space(updates)
    p, q = space.cores.shape[1:]
    assert (p, q) == (min(12, shape[0]), min(12, shape[1]))
    identity = torch.eye(max(p, q), dtype=torch.float64)
    torch.testing.assert_close(space.left.T @ space.left, identity[:p, :p])
    torch.testing.assert_close(space.right @ space.right.T, identity[:q, :q])
    for x, core in zip(updates, space.cores, strict=True):
        again = space.expand(core)
        torch.testing.assert_close(again.B @ again.A, x.B.double() @ x.A.double())


def test_neither_order_nor_factors_turn_its_axes() -> None:
    """But for the sign of an axis, which is the same in all cores."""
    one, other = random_lowrank((9, 8), 2, 1), random_lowrank((9, 8), 3, 2)
    mix = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    again = LowRank(torch.linalg.inv(mix) @ one.A * 7, one.B @ mix / 7)
    first, second = common_space([one, other]), common_space([other, again])
    torch.testing.assert_close(first.cores.abs(), second.cores.flip(0).abs(), rtol=1e-4, atol=1e-5)


def test_directions_that_all_share_are_there_once() -> None:
    x = random_lowrank((9, 8), 2, 1)
    space = common_space([x, x, LowRank(x.A, 2 * x.B)])
    assert space.cores.shape == (3, 2, 2)


def test_of_nothing_there_is_no_space() -> None:
    space = common_space([random_lowrank((9, 8), 0, 1)])
    assert space.cores.shape == (1, 0, 0)
    assert space.expand(space.cores[0]).rank == 0

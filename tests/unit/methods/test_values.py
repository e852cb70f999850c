"""What a rule takes and gives: which factors are trained and sent, what lies frozen."""

from __future__ import annotations

import torch

from fedlora.methods.values import ServerState, Start, Training
from support.adapters import random_lowrank
from support.simulated import matrix


def test_factors_take_turns_by_round() -> None:
    turns = Training(trains=("B", "A", "AB"))
    assert [turns.trained(round) for round in (1, 2, 3, 4)] == ["B", "A", "AB", "B"]
    assert [Training().trained(round) for round in (1, 2)] == ["AB", "AB"]


def test_a_factor_that_is_kept_is_not_sent() -> None:
    keeps = Training(trains=("AB", "B"), keeps="B")
    assert [keeps.sent(round) for round in (1, 2)] == ["A", ""]
    assert Training(trains=("B",)).sent(1) == "B"


def test_what_lies_frozen_is_shared_and_private_together() -> None:
    x, y, z = (random_lowrank((4, 3), 1, seed) for seed in range(3))
    start = Start({}, private={"q": x, "v": y}, shared={"q": z})
    torch.testing.assert_close(matrix(start.frozen["q"]), matrix(x) + matrix(z))
    torch.testing.assert_close(matrix(start.frozen["v"]), matrix(y))


def test_levels_are_the_distinct_ranks() -> None:
    assert ServerState(0, {}, ranks={0: 8, 1: 2, 2: 8, 3: 4}).levels == (2, 4, 8)
    assert ServerState(0, {}).levels == ()

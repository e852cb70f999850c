"""The pieces rules are made of, each against its formula in dense float64."""

from __future__ import annotations

import torch

from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from fedlora.methods.shared import (
    add_factors,
    change,
    cut_to_rank,
    factor_change,
    fill,
    fresh_start,
    padded_change,
    prefix_start,
    shared_initial,
    shift_to_zeros,
    whole_start,
    with_shift,
)
from fedlora.methods.values import Encoded, Prepared, RoundNumbers, ServerState, Start
from support.adapters import random_lowrank
from support.simulated import matrix

SHAPES = {"q": (6, 5)}
NUMBERS = RoundNumbers({"q": 4}, (2, 4))


def fresh(name: str, rank: int) -> torch.Tensor:
    """Rows of ones, twos, threes ..."""
    return torch.arange(1.0, rank + 1)[:, None].expand(rank, SHAPES[name][1]).clone()


def test_a_fresh_start_and_fresh_directions_change_nothing() -> None:
    start = fresh_start(SHAPES, 3, fresh)["q"]
    assert torch.equal(start.A, fresh("q", 3))
    assert not start.B.any()
    x = random_lowrank((6, 5), 2, 0)
    filled = fill(x, fresh("q", 3))
    assert filled.rank == 5
    assert torch.equal(matrix(filled), matrix(x))


def test_a_change_is_the_difference_of_products() -> None:
    began, ended = random_lowrank((6, 5), 4, 0), random_lowrank((6, 5), 2, 1)  # it has pruned
    learnt = change({"q": ended}, {"q": began})["q"]
    torch.testing.assert_close(matrix(learnt), matrix(ended) - matrix(began))
    untouched = change({"q": ended}, {"q": fresh_start(SHAPES, 4, fresh)["q"]})["q"]
    assert isinstance(untouched, LowRank)
    assert untouched.rank == 2  # directions that begin with B = 0 add none


def test_a_given_adapter_goes_on_and_loses_nothing() -> None:
    given = random_lowrank((6, 5), 4, 0)
    for rank in (2, 4, 6):
        adapter, beyond = shared_initial(SHAPES, rank, fresh, {"q": given})
        held = matrix(adapter["q"]) + (matrix(beyond["q"]) if "q" in beyond else 0)
        torch.testing.assert_close(held, matrix(given), rtol=1e-5, atol=1e-6)
        assert isinstance(adapter["q"], LowRank)
        assert adapter["q"].rank == rank
        assert ("q" in beyond) == (rank < 4)


def test_starts_of_small_clients() -> None:
    x = random_lowrank((6, 5), 4, 0)
    prepared = cut_to_rank(Prepared({"q": x}, {"q": x}, 0.5), 2, None)
    assert torch.equal(prepared.leading["q"].A, x.A[:2])
    assert prepared.error == 0.5
    seen = prefix_start({}, {"q": x}, SHAPES, 2, fresh, None)
    whole = whole_start({}, {"q": x}, SHAPES, 2, fresh, None)
    assert torch.equal(matrix(seen.adapter["q"]), matrix(whole.adapter["q"]))
    assert not seen.frozen
    both = matrix(whole.adapter["q"]) + matrix(whole.frozen["q"])
    torch.testing.assert_close(both, matrix(x), rtol=1e-5, atol=1e-6)


def test_factors_are_padded_to_one_width() -> None:
    began, ended = random_lowrank((6, 5), 2, 0), random_lowrank((6, 5), 2, 1)
    factors = factor_change({"q": ended}, Start({"q": began}), NUMBERS, None).factors
    assert factors["q.A"].shape == (4, 5)
    assert torch.equal(factors["q.A"][:2], ended.A - began.A)
    assert torch.equal(factors["q.B"][:, :2], ended.B - began.B)
    assert not factors["q.A"][2:].any()
    assert not factors["q.B"][:, 2:].any()


def test_with_its_shift_a_padded_change_is_that_to_factors_padded_with_zeros() -> None:
    current = random_lowrank((6, 5), 4, 0)
    state = ServerState(0, {"q": current})
    ended = random_lowrank((6, 5), 2, 1)
    start = Start({"q": LowRank(current.A[:2], current.B[:, :2])})
    encoded = padded_change({"q": ended}, start, NUMBERS, None)
    shifted = with_shift(METHODS["zero_pad"], encoded, state, METHODS["zero_pad"].options())
    padded = torch.zeros(4, 5)
    padded[:2] = ended.A
    torch.testing.assert_close(shifted.factors["q.A"], padded - current.A)
    moved = add_factors(shifted, state, 4, None).adapter["q"]
    torch.testing.assert_close(matrix(moved), matrix(ended), rtol=1e-5, atol=1e-6)


def test_a_shift_is_linear() -> None:
    state = ServerState(0, {"q": random_lowrank((6, 5), 4, 0)})
    start = Start({"q": random_lowrank((6, 5), 2, 1)})
    one = padded_change({"q": random_lowrank((6, 5), 2, 2)}, start, NUMBERS, None)
    twice = Encoded(one.factors, {}, {name: 2 * value for name, value in one.weights.items()})
    once, double = (shift_to_zeros(x, state, None).factors["q.B"] for x in (one, twice))
    torch.testing.assert_close(2 * once, double)


def test_a_module_that_nobody_trained_stays() -> None:
    state = ServerState(0, {"q": random_lowrank((6, 5), 4, 0)})
    assert add_factors(Encoded(), state, 4, None).adapter["q"] is state.adapter["q"]
    assert not shift_to_zeros(Encoded(), state, None).factors

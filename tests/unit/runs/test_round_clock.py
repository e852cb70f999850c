"""Where the seconds of a round go, by a clock that is set by hand."""

from __future__ import annotations

import pytest

from fedlora.runs.round_clock import RoundClock


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_every_second_counts_for_the_part_that_goes_on() -> None:
    hand = Hand()
    clock = RoundClock("aggregate", hand)
    hand.time += 1
    clock.now("train")
    hand.time += 10
    with clock.meanwhile("aggregate"):
        hand.time += 2
        with clock.meanwhile("evaluate"):
            hand.time += 4
        hand.time += 3
    hand.time += 20
    assert clock.seconds() == {"train": 30.0, "aggregate": 6.0, "evaluate": 4.0}
    hand.time += 5
    assert clock.seconds()["train"] == 35.0
    assert sum(clock.seconds().values()) == hand.time - 100.0


def test_after_a_failure_the_part_before_goes_on() -> None:
    hand = Hand()
    clock = RoundClock("train", hand)

    def fails() -> None:
        with clock.meanwhile("evaluate"):
            hand.time += 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    hand.time += 2
    assert clock.seconds() == {"train": 2.0, "aggregate": 0.0, "evaluate": 1.0}


def test_what_is_given_out_does_not_change_any_more() -> None:
    hand = Hand()
    clock = RoundClock("train", hand)
    before = clock.seconds()
    hand.time += 9
    clock.now("evaluate")
    assert before["train"] == 0.0

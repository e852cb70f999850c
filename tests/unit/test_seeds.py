"""Streams of random numbers: each depends on its own name and on nothing else."""

from __future__ import annotations

import itertools
import math

import torch

from fedlora.seeds import SERVER, Purpose, fresh_factors, generator, integer

SHAPES = {"b": (6, 16), "a": (4, 9)}
"""Module -> (outputs, inputs)."""


def test_the_numbers_of_purposes_never_change() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "SHARED_INIT": 0,
        "CLIENT_INIT": 1,
        "SAMPLING": 2,
        "RANKS": 3,
        "PARTITION": 4,
        "HOLDOUT": 5,
        "BATCHES": 6,
        "DROPOUT": 7,
        "EVALUATION": 8,
        "HEAD": 9,
        "TRAIN_ROWS": 10,
        "EVAL_ROWS": 11,
        "ORDER": 12,
    }


def test_a_stream_is_the_same_whatever_was_drawn_before_it() -> None:
    first = generator(3, 2, 1, Purpose.BATCHES).permutation(50)
    generator(3, 2, 0, Purpose.BATCHES).permutation(50)
    assert (generator(3, 2, 1, Purpose.BATCHES).permutation(50) == first).all()


def test_every_part_of_its_name_makes_another_stream() -> None:
    purposes = (Purpose.BATCHES, Purpose.DROPOUT)
    names = list(itertools.product((0, 1), (0, 1), (0, 1), purposes))
    draws = {integer(*name) for name in names}
    assert len(draws) == len(names)
    assert all(0 <= draw < 2**63 for draw in draws)


def test_initial_factors_are_those_of_lora() -> None:
    fresh = fresh_factors(0, 0, SERVER, Purpose.SHARED_INIT, SHAPES)
    for module, (_, inputs) in SHAPES.items():
        factor = fresh(module, 64)
        assert factor.shape == (64, inputs)
        assert factor.dtype == torch.float32
        bound = 1 / math.sqrt(inputs)
        assert 0.9 * bound < factor.abs().max() <= bound


def test_a_smaller_rank_gets_the_leading_rows_of_a_larger_one() -> None:
    fresh = fresh_factors(0, 1, 2, Purpose.CLIENT_INIT, SHAPES)
    assert torch.equal(fresh("a", 3), fresh("a", 8)[:3])


def test_modules_differ_and_their_order_does_not_matter() -> None:
    fresh = fresh_factors(0, 0, SERVER, Purpose.SHARED_INIT, {"a": (4, 9), "b": (4, 9)})
    again = fresh_factors(0, 0, SERVER, Purpose.SHARED_INIT, {"b": (4, 9), "a": (4, 9)})
    assert not torch.equal(fresh("a", 2), fresh("b", 2))
    assert torch.equal(fresh("b", 2), again("b", 2))

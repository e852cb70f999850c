"""Which lengths get the same rotary factors."""

from __future__ import annotations

from typing import Any

import torch

from fedlora.model.rotary_factors import RotaryFactors
from fedlora.model.wide import ForwardState
from support.packing import SIZES, built

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}


def examined(name: str, **config: Any) -> tuple[Any, RotaryFactors]:
    """A model, and what is found out of it."""
    model = built(name, {**SIZES, **config})
    rotary = RotaryFactors(ForwardState(model), [model.config], 0)
    rotary.examine(model, torch.float64)
    return model, rotary


def test_plain_factors_are_the_same_for_all_lengths() -> None:
    model, rotary = examined("llama")
    assert rotary.uses_positions
    assert not rotary.follow_longest
    assert {rotary.class_of(model, length) for length in (1, 30, 200)} == {0}


def test_longrope_has_two_classes_with_the_border_where_it_says() -> None:
    model, rotary = examined("llama", rope_parameters=LONGROPE, max_position_embeddings=128)
    assert rotary.follow_longest
    classes = [rotary.class_of(model, length) for length in (5, 32, 33, 100)]
    assert classes[0] == classes[1] != classes[2] == classes[3]


def test_dynamic_factors_differ_from_length_to_length_beyond_the_table() -> None:
    model, rotary = examined("llama", rope_parameters=DYNAMIC, max_position_embeddings=32)
    short, *longer = (rotary.class_of(model, length) for length in (20, 48, 64))
    assert short == 0
    assert len({short, *longer}) == 3


def test_a_model_without_positions_has_one_class() -> None:
    rotary = RotaryFactors(ForwardState(torch.nn.Module()), [], 0)
    assert rotary.class_of(None, 10_000) == 0


def test_examining_leaves_the_model_as_it_was() -> None:
    model = built("llama", {**SIZES, "rope_parameters": DYNAMIC, "max_position_embeddings": 32})
    model.train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    rotary = RotaryFactors(ForwardState(model), [model.config], 0)
    rotary.examine(model, torch.float64)
    rotary.class_of(model, 64)
    assert model.training
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())

"""What was found out about a model is kept for as long as the model lives."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
from torch import nn

from fedlora.model.per_model import PerModel


def test_a_value_is_made_once_for_each_model() -> None:
    made: list[int] = []

    def make(model: nn.Module) -> list[int]:
        made.append(id(model))
        return [len(made)]

    values = PerModel(make)
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    assert values(one) is values(one)
    assert values(other) == [2]
    assert made == [id(one), id(other)]


def test_a_model_is_freed_with_its_value() -> None:
    values = PerModel(lambda model: nn.Linear(1, 1))
    model = nn.Linear(1, 1)
    value, alive = ref(values(model)), ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert value() is None


def test_what_fails_is_tried_again() -> None:
    answers = iter([ValueError("not yet"), "found"])

    def make(model: nn.Module) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    values, model = PerModel(make), nn.Linear(1, 1)
    with pytest.raises(ValueError, match="not yet"):
        values(model)
    assert values(model) == "found"

"""Mistakes in a configuration, said in words."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from fedlora.config.config import Config
from fedlora.config.errors_in_words import expected, members, readable


def test_members_of_a_union_and_of_a_single_type() -> None:
    assert members(int | None) == [int, type(None)]
    assert members(int) == [int]
    assert members(list[int]) == [list[int]]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or none"),
        (int | list[int] | None, "a whole number, a list of whole numbers or none"),
        (str | list[str], "text or a list of names"),
        (Literal["a", "b", "c"], "a, b or c"),
        (dict[int, dict[str, Any]], "a table of clients and their settings"),
        (bool | Literal["auto"], "true or false or auto"),
    ],
)
def test_what_is_expected(annotation: Any, words: str) -> None:
    assert expected(annotation) == words


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seed": True}, "seed: True: expected a whole number (a key without a value is true)"),
        ({"seed": False}, "seed: False: expected a whole number"),
        ({"client_ranks": [8, True]}, "client_ranks: [8, True]: expected "),
    ],
)
def test_true_and_false_are_no_numbers(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**keys)


class Keys(BaseModel):
    """A few keys with every kind of limit."""

    count: int | list[int] = 1
    share: float = Field(0.5, gt=0, le=1, allow_inf_nan=False)
    word: str = "x"

    @field_validator("word")
    @classmethod
    def known(cls, value: str) -> str:
        if value != "x":
            raise ValueError("word: only x is known")
        return value


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"count": "many"}, ["count: 'many': expected a whole number or a list of whole numbers"]),
        ({"share": 0}, ["share: 0 must be greater than 0"]),
        ({"share": 2}, ["share: 2 must be at most 1"]),
        ({"share": float("nan")}, ["share: nan must be a finite number"]),
        ({"word": "y"}, ["word: only x is known"]),
        (
            {"count": [1, "two"], "share": 0},
            [
                "count: [1, 'two']: expected a whole number or a list of whole numbers",
                "share: 0 must be greater than 0",
            ],
        ),
    ],
)
def test_one_line_for_each_key(values: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ValidationError) as error:
        Keys(**values)
    said = readable(error.value, values, lambda key: Keys.model_fields[key].annotation)
    assert said.splitlines() == lines

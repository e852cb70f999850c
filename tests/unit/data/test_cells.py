"""Cells of a row: texts, and what it gives its chat template."""

from __future__ import annotations

import pytest

from fedlora.data.cells import extra_of, numbers_of, text_of
from fedlora.errors import InputError


def test_the_first_text_that_is_not_empty() -> None:
    assert text_of({"a": None, "b": 3}, "a", "b") == "3"
    assert text_of({}, "a") == ""
    with pytest.raises(InputError, match="the column a holds a list"):
        text_of({"a": [1]}, "a")


def test_what_a_row_gives_its_chat_template() -> None:
    row = {"tools": '[{"name": "add"}]', "chat_template_kwargs": {"thinking": True, "x": None}}
    assert extra_of(row) == {"thinking": True, "tools": [{"name": "add"}]}
    assert extra_of({}) == {}


def test_turns_that_are_left_out() -> None:
    assert numbers_of([True, False, True]) == {0, 2}

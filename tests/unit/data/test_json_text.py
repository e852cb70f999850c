"""JSON as data sets hold it."""

from __future__ import annotations

import pytest

from fedlora.data.json_text import loads


def test_nan_is_a_missing_value() -> None:
    assert loads('[NaN, 1.5, {"a": NaN}]') == [None, 1.5, {"a": None}]


def test_half_of_a_pair_of_surrogates_is_the_replacement_character() -> None:
    assert loads(r'{"a\ud83d": ["\ude00x", "\ud83d\ude00"]}') == {
        "a\ufffd": ["\ufffdx", "\U0001f600"]
    }


def test_what_is_malformed_is_refused() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        loads("{")

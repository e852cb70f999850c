"""Text for people and for JSON: suggestions, sizes, natural order, numbers JSON cannot hold."""

from __future__ import annotations

import math

import pytest

from fedlora.text import finite, human_bytes, natural, nearest


def test_a_key_with_a_slip_is_recognised() -> None:
    assert nearest("num_round", ["num_rounds", "seed"]) == "; did you mean num_rounds?"
    assert nearest("num_round", {"num_rounds": 3}) == "; did you mean num_rounds?"


def test_an_unlike_key_gets_what_is_said_otherwise() -> None:
    assert nearest("zzz", ["seed"]) == "; `fedlora config` lists all keys"
    assert nearest("zzz", ["seed"], otherwise="") == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (1536, "1.5 KB"),
        (2_500_000, "2.5 MB"),
        (3e9, "3.0 GB"),
        (4e12, "4.0 TB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_sizes_in_units_of_a_thousand(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_what_json_cannot_hold_becomes_null() -> None:
    given = {1: [math.nan, (math.inf, 2.5)], "deep": {"x": -math.inf, "word": "nan", "n": None}}
    expected = {"1": [None, [None, 2.5]], "deep": {"x": None, "word": "nan", "n": None}}
    assert finite(given) == expected


def test_natural_order_counts_as_people_do() -> None:
    names = ["site_10", "site_9", "site_1", "a2b10", "a2b9"]
    assert sorted(names, key=natural) == ["a2b9", "a2b10", "site_1", "site_9", "site_10"]

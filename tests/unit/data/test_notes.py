"""What is said of the data: dropped rows, clients left out, labels that look alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.data.notes import alike, all_dropped, kept, left_out, reasons
from fedlora.errors import InputError

TOKENS: Any = {"input_ids": [1], "labels": [1]}


def raw(*sizes: int) -> Any:
    return SimpleNamespace(
        clients=[[{}] * size for size in sizes], called=lambda client: f"client {client}"
    )


def test_rows_that_are_kept_and_why_others_are_not() -> None:
    outcomes = [TOKENS, "too long", TOKENS, "too long", "empty"]
    assert kept(outcomes) == [TOKENS, TOKENS]
    assert reasons(outcomes) == {"too long": 2, "empty": 1}


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([], ""),
        ([TOKENS, "empty"], ""),
        (["empty", "empty"], "all 2 rows are dropped: empty"),
        (
            ["longer than max_length", "empty", "longer than max_length"],
            "all 3 rows are dropped, 2 of them because: longer than max_length; use a larger one",
        ),
    ],
)
def test_why_no_row_is_left(outcomes: list[Any], said: str) -> None:
    assert all_dropped(outcomes) == said


def test_clients_without_a_row_are_left_out_and_named() -> None:
    assert left_out(raw(2, 2), {}, strict=True) == []
    one = left_out(raw(2, 2, 2), {1: "no label"}, strict=False)
    assert one == ["1 of 3 clients takes no part: client 1: no label"]
    two = left_out(raw(2, 2, 2), {0: "x", 1: "y"}, strict=False)
    assert two == ["2 of 3 clients take no part: client 0: x; client 1: y"]


def test_not_all_may_be_left_out_and_none_where_that_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"^client 0: x$"):
        left_out(raw(2, 0), {0: "x"}, strict=False)
    with pytest.raises(InputError, match=r"Mend them, or leave strict_clients out"):
        left_out(raw(2, 2), {0: "x"}, strict=True)


def test_labels_that_differ_by_white_space_or_capitals_alone() -> None:
    assert alike(["yes", "no"]) == []
    (said,) = alike(["Yes", "yes ", "no"])
    assert said.endswith("counted as different: 'Yes' and 'yes '")

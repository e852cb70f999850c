"""What can be measured of a model: means over clients, titles, log scales."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.commands.report.measures import DWARFS, _dwarfed, titled


def test_of_the_global_model_every_number_counts() -> None:
    line: Any = {"evaluation": {"loss": 1.5, "examples": 3, "note": "x"}}
    assert titled(line, "evaluation") == {"loss": 1.5, "examples": 3}
    assert titled(line, "general_evaluation") == {}


def test_over_clients_it_is_the_mean_of_those_that_have_one() -> None:
    line: Any = {
        "client_evaluations": {"0": {"loss": 1.0, "accuracy": 0.5}, "1": {"loss": 3.0}, "2": {}}
    }
    assert titled(line, "client_evaluations") == {"loss": 2.0, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("values", "dwarfed"),
    [
        ([DWARFS * 2.0 + 1, 2.0, 2.0], True),
        ([DWARFS * 2.0, 2.0, 2.0], False),
        ([1e9], False),
    ],
)
def test_a_first_value_may_dwarf_the_others(values: list[float], dwarfed: bool) -> None:
    assert _dwarfed(values) is dwarfed

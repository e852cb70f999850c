"""The names of all that a run reports and logs."""

from __future__ import annotations

import re
import sys
from typing import Any, get_args, get_type_hints

import pytest

from fedlora.runs import events
from fedlora.runs.events import DETAILS, LOGGED, REPORTED, ignore


@pytest.mark.parametrize("table", [REPORTED, LOGGED])
def test_an_event_says_its_own_name(table: dict[str, Any]) -> None:
    for name, kind in table.items():
        assert get_args(get_type_hints(kind)["event"]) == (name,)


def test_the_table_in_the_module_is_that_of_the_names() -> None:
    rows = re.findall(r"^    (\w+) +(\S+) +(\S+) +[a-z`]", str(events.__doc__), re.M)
    table = {name: (reported, logged) for name, reported, logged in rows if name != "event"}
    assert {name for name, (reported, _) in table.items() if reported != "no"} == set(REPORTED)
    assert {name for name, (_, logged) in table.items() if logged != "no"} == set(LOGGED)


def test_details_are_reported_and_not_logged() -> None:
    assert set(REPORTED) >= DETAILS
    assert not set(LOGGED) & DETAILS
    assert ignore({"event": "step"}) is None  # type: ignore[func-returns-value]


def test_every_field_is_described() -> None:
    shared = f"{events.Evaluations.__doc__}{events.SometimesInRound.__doc__}"
    for kind in {*REPORTED.values(), *LOGGED.values()}:
        described = f"{kind.__doc__}{shared}"
        fields = set(get_type_hints(kind)) - {"event"}
        assert all(re.search(rf"\b{field}\b[^.]*:", described) for field in fields), kind


def test_nothing_but_the_standard_library_is_needed() -> None:
    names = {str(getattr(value, "__module__", "")) for value in vars(events).values()}
    roots = {name.partition(".")[0] for name in names} - {"", "fedlora"}
    assert roots <= set(sys.stdlib_module_names)

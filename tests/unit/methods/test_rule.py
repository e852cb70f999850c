"""What an aggregation rule is: options within their bounds, and what every rule says of itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from fedlora.methods import METHODS, ONE_SHOT
from fedlora.methods.rule import Rule, as_usual, both_factors, bounded, check_bounds
from fedlora.methods.values import Training


@dataclass(frozen=True)
class Options:
    """Options of every kind."""

    share: float = bounded(0.5, gt=0, le=1)
    between: float = bounded(0.5, ge=0, le=1)
    steps: int = bounded(3, ge=1)
    rate: float = bounded(1.0, gt=0)
    limit: int | None = bounded(None, ge=1)

    def __post_init__(self) -> None:
        check_bounds(self)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"share": 0.0}, "share: 0.0 must be above 0 and at most 1"),
        ({"between": 1.5}, "between: 1.5 must lie between 0 and 1"),
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"rate": float("inf")}, "rate: inf must be greater than 0, and finite"),
        ({"rate": float("nan")}, "rate: nan must be greater than 0, and finite"),
        ({"limit": 0}, "limit: 0 must be at least 1"),
    ],
)
def test_an_option_outside_its_bounds(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}$"):
        Options(**values)
    Options(share=1.0, between=0.0, steps=1, limit=None)


def test_every_rule_checks_its_options_and_is_named_as_it_is_called() -> None:
    for name, rule in METHODS.items():
        assert rule.name == name
        assert rule.title
        assert rule.paper
        for option in fields(rule.options):
            bounds = option.metadata.get("bounds", {})
            if "le" in bounds or "ge" in bounds:
                beyond = bounds["le"] + 1 if "le" in bounds else bounds["ge"] - 1
                with pytest.raises(ValueError, match=f"^{option.name}: "):
                    rule.options(**{option.name: beyond})


def test_what_a_rule_does_unless_it_says_otherwise() -> None:
    assert as_usual(None) == Training(("AB",))
    assert both_factors(3, True) == "AB"
    defaults = {f.name: f.default for f in fields(Rule)}
    assert defaults["shift"] is None
    assert defaults["one_shot"] is True


def test_rules_without_a_shared_start_are_those_that_say_so() -> None:
    assert set(ONE_SHOT) == {name for name, rule in METHODS.items() if rule.one_shot}
    assert "exact" in ONE_SHOT

"""What rules say of their options: descriptions, types, who has which."""

from __future__ import annotations

import dataclasses

from fedlora.config.config import Config
from fedlora.config.rule_options import option_line, rules_by_option, type_of
from fedlora.methods import METHODS, rule_keys


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a rule that does not exist.

    Args:
        share: of the rank that is kept,
            between 0 and 1.
        steps: how many.
    """

    share: float = 0.5
    steps: int = 3
    silent: int = 0


def test_the_description_of_an_option_is_one_line() -> None:
    assert option_line(Options, "share") == "of the rank that is kept, between 0 and 1."
    assert option_line(Options, "steps") == "how many."
    assert option_line(Options, "silent") == ""


def test_every_option_of_every_rule_is_described() -> None:
    for rule in METHODS.values():
        for option in dataclasses.fields(rule.options):
            assert option_line(rule.options, option.name), f"{rule.name}: {option.name}"


def test_rules_and_options_name_each_other() -> None:
    table = rules_by_option()
    assert table.keys() == rule_keys()
    for name, rules in table.items():
        for rule in METHODS:
            has = name in {f.name for f in dataclasses.fields(METHODS[rule].options)}
            assert (rule in rules) == has


def test_types_are_resolved_to_types() -> None:
    """Annotations are text in the modules, which would say nothing to a check of types."""
    assert {key: type_of(Config, key) for key in rule_keys()}["start_fraction"] is float
    assert not any(isinstance(type_of(Config, key), str) for key in rule_keys())


def test_a_configurations_own_key_goes_before_an_options_name() -> None:
    assert type_of(Config, "num_rounds") is int

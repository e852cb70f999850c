"""Bytes are counted on small matrices, and multiplied back."""

from __future__ import annotations

import pytest

from fedlora.federation.exchange import Agreement
from fedlora.federation.participants import Federation
from fedlora.methods import METHODS
from fedlora.runs.planning.simulated_traffic import adds_to_base, traffic

SHAPES = {"a": (64, 128), "b": (64, 128), "c": (32, 64)}


def federation(ranks: list[int], **keys: object) -> Federation:
    rule = METHODS["fedit"]
    return Federation(ranks, [10] * len(ranks), Agreement(rule, rule.options(), SHAPES, **keys))  # type: ignore[arg-type]


def test_fedit_sends_its_factors_up_and_down() -> None:
    rule = METHODS["fedit"]
    counted = traffic(federation([8, 8]), rule, rule.options(), 3)
    each = 4 * 8 * (192 + 192 + 96)
    assert counted.up == 2 * each
    assert counted.all_up == 3 * 2 * each
    assert counted.down == 2 * each
    assert not counted.adds_to_base


def test_a_smaller_server_counts_what_a_whole_one_counts() -> None:
    """Ranks of 16 and 8 are divided by 2; with 5 clients of rank 13 nothing can be divided."""
    rule = METHODS["flora"]
    shrunk = traffic(federation([16, 8]), rule, rule.options(), 3)
    assert shrunk.up == 4 * 24 * (192 + 192 + 96)
    assert traffic(federation([13]), rule, rule.options(), 2).up == 4 * 13 * (192 + 192 + 96)


def test_compression_and_whole_modules_count() -> None:
    rule = METHODS["fedit"]
    half = traffic(federation([8, 8], compression="bf16"), rule, rule.options(), 2, dense=10)
    assert half.up == 2 * (2 * 8 * (192 + 192 + 96) + 40)


def test_later_rounds_are_like_the_last_that_was_played() -> None:
    rule = METHODS["fedit"]
    long = traffic(federation([8, 8]), rule, rule.options(), 200)
    assert long.played < 200
    assert long.all_up == 200 * long.up


@pytest.mark.parametrize(("name", "adds"), [("fedit", False), ("flora", True), ("exact", True)])
def test_which_rules_add_to_the_base(name: str, adds: bool) -> None:
    assert adds_to_base(METHODS[name], METHODS[name].options()) is adds

"""Chooses which cases of a product of rules and conditions run at every turn of the suite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

PARTS = 4
"""Every how many conditions a rule comes up."""


def in_turn(rules: Iterable[str], turn: int) -> list[Any]:
    """Rules as parameters of a test under one condition: a quarter of them is quick.

    Many conditions are tried under every rule, a run for each pair. `make test` takes another
    quarter of the rules under each condition, so that every condition is tried, and every rule
    under a quarter of them. The other pairs are slow: `make test-slow` and `.ci/run` take them.

    Args:
        rules: names of rules.
        turn: the condition's number; conditions of one file have different ones.
    """
    return [
        name if i % PARTS == turn % PARTS else pytest.param(name, marks=pytest.mark.slow)
        for i, name in enumerate(rules)
    ]

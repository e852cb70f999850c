"""The table that `fedlora demo` prints, and its seeds."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import ttest_rel

from fedlora.commands.demo import showcase


def made(
    curves: dict[str, dict[int, list[float]]], alone: dict[int, float] | None = None
) -> showcase.Shown:
    sizes = dict.fromkeys(curves, (31.4e6, 250.1e6))
    rounds = [0, 2, 4]
    return showcase.Shown(rounds, curves, alone or {}, sizes, 200.0, Path("fedlora-demo"))


def printed(shown: showcase.Shown) -> str:
    out = io.StringIO()
    showcase.show(shown, Console(file=out, width=80))
    return out.getvalue()


CURVES = {
    "exact": {0: [0.0, 0.40, 0.60], 1: [0.0, 0.30, 0.70], 2: [0.0, 0.20, 0.65]},
    "flora": {0: [0.0, 0.30, 0.66], 1: [0.0, 0.33, 0.61], 2: [0.0, 0.30, 0.65]},
}


def test_the_table_has_means_over_seeds_and_says_what_differences_are_worth() -> None:
    text = printed(made(CURVES, {0: 0.2, 1: 0.3, 2: 0.4}))
    assert "mean ± standard deviation over 3 seeds" in " ".join(text.split())
    assert re.search(r"method +0 +2 +4 +up +down", text)
    assert re.search(r"exact +0\.0 +30\.0 +65\.0 ± 5\.0 +31\.4 MB +250\.1 MB", text)
    assert re.search(r"flora +0\.0 +31\.0 +64\.0 ± 2\.6 ", text)
    assert re.search(r"alone, mean +30\.0 ", text)
    assert re.search(r"alone, best +40\.0 ", text)
    assert re.search(r"exact +60\.0, 70\.0, 65\.0", text)
    # scipy's paired t-test gives the same interval.
    a, b = ([100 * x[-1] for x in CURVES[m].values()] for m in ("exact", "flora"))
    low, high = ttest_rel(a, b).confidence_interval(0.95)
    said = f"exact against flora: +1.0 points, 95% interval {low:+.1f} to {high:+.1f}"
    assert f"{said}:\n  these seeds show no difference" in text
    assert "alone: the 3 clients of seed 0" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_a_difference_in_every_seed_is_said_to_be_one_and_a_single_seed_is_not() -> None:
    apart = {**CURVES, "flora": {s: [0.0, 0.1, x[-1] - 0.2] for s, x in CURVES["exact"].items()}}
    assert "these seeds show a difference" in printed(made(apart))
    one = {method: {0: x[0]} for method, x in CURVES.items()}
    text = printed(made(one))
    assert "one seed shows no difference and no tie" in text
    assert "±" not in text


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ({}, [0]),
        ({"seed": "7"}, [7]),
        ({"seeds": "4"}, [4]),
        ({"seeds": ["4", "2"]}, [4, 2]),
        ({"seeds": [1, 2, 3], "seed": 9}, [1, 2, 3]),
    ],
)
def test_seeds(given: dict[str, Any], seeds: list[int]) -> None:
    assert showcase._seeds(dict(given)) == seeds

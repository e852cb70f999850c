"""How adapters are combined: weights as shares or as they are, methods and their options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora import InputError, aggregate
from fedlora.adapters.combining import check_options, method_with_options, used_weights
from fedlora.methods import METHODS, ONE_SHOT
from fedlora.methods.merges import MERGES
from support.merging import effect, made, same_effect

PARTS = [
    made({"a": ((11, 7), 4), "b": ((6, 13), 2)}, 1),
    made({"a": ((11, 7), 2), "b": ((6, 13), 1)}, 2),
    made({"a": ((11, 7), 6)}, 3),
]


@pytest.mark.parametrize("name", [*ONE_SHOT, *MERGES])
def test_every_method_can_be_named(name: str) -> None:
    assert check_options(name, []).name == name
    method, options = method_with_options(name, {})
    assert isinstance(options, method.options)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("ffa", [], "needs a start that all clients share; there are .*exact.*ties"),
        ("tiess", [], "tiess is unknown"),
        ("ties", ["seed"], "seed: unknown to aggregate with the method ties; its options: density"),
        ("tsv", ["density"], "it has no options"),
        ("exact", ["start_fraction"], "acts on training"),
    ],
)
def test_what_is_unknown_is_refused(method: str, options: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_options(method, options)


def test_weights_as_they_are_used() -> None:
    exact, tsv = METHODS["exact"], MERGES["tsv"]
    assert used_weights(exact, [3.0, 1.0], 2, False) == [0.75, 0.25]
    assert used_weights(tsv, [3.0, 1.0], 2, False) == [1.5, 0.5]
    assert used_weights(tsv, [3.0, 1.0, 0.0], 3, False) == [1.5, 0.5, 0.0]
    assert used_weights(exact, [3.0, -1.0], 2, True) == [3.0, -1.0]
    assert used_weights(exact, None, 2, True) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("method", "weights", "raw", "says"),
    [
        ("exact", [1.0, -0.5], False, "negative ones go with --raw_weights"),
        ("exact", [1.0], False, "weights: 1 for 2 adapters"),
        ("exact", [0.0, 0.0], True, "one of them other than 0"),
        ("exact", [1.0, float("nan")], True, "expected numbers"),
        ("fedit", [1.0, 1.0], True, "fedit averages, .*use exact, ties, dare"),
    ],
)
def test_impossible_weights(method: str, weights: list[float], raw: bool, says: str) -> None:
    with pytest.raises(InputError, match=says):
        used_weights(check_options(method, []), weights, 2, raw)


def test_a_site_is_taken_out_of_a_sum_again() -> None:
    p = (0.5, 0.3, 0.2)
    together = aggregate(PARTS, p)
    keep = 1 - p[1]
    without = aggregate(
        [replace(together, config=PARTS[0].config), PARTS[1]],
        [1 / keep, -p[1] / keep],
        raw_weights=True,
    )
    wanted = aggregate([PARTS[0], PARTS[2]], [p[0], p[2]])
    same_effect(effect(without), effect(wanted), 1e-5)
    assert without.weights == (1 / keep, -p[1] / keep)


def test_a_head_is_taken_out_of_a_mean_again() -> None:
    heads = [torch.randn(2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    parts = [replace(x, dense={"score.weight": h}) for x, h in zip(PARTS, heads, strict=True)]
    together = aggregate(parts)
    without = aggregate(
        [replace(together, config=PARTS[0].config), parts[2]], [1.0, -1 / 3], raw_weights=True
    )
    torch.testing.assert_close(without.dense["score.weight"], (heads[0] + heads[1]) / 2)
    with pytest.raises(InputError, match=r"score\.weight: was trained whole .* sum to 0"):
        aggregate(parts[:2], [1.0, -1.0], raw_weights=True)


@pytest.mark.parametrize("method", MERGES)
def test_an_adapter_of_weight_zero_takes_no_part(method: str) -> None:
    found = aggregate(PARTS, [0.6, 0.0, 0.4], method=method)
    wanted: dict[str, Any] = effect(aggregate(PARTS[::2], [0.6, 0.4], method=method))
    if method == "dare":  # the third adapter's draws are those of its place
        assert found.deltas["a"].rank <= 7
    else:
        same_effect(effect(found), wanted, 1e-5)


@pytest.mark.parametrize("method", [name for name in MERGES if name != "dare"])
def test_the_order_of_adapters_decides_nothing(method: str) -> None:
    first = aggregate(PARTS, [0.5, 0.3, 0.2], method=method)
    second = aggregate(PARTS[::-1], [0.2, 0.3, 0.5], method=method)
    same_effect(effect(first), effect(second), 1e-5)

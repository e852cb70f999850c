"""Plain values of a message's body: what is one comes back, and all else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedlora.federation import plain_values as plain


@pytest.mark.parametrize(
    ("reader", "good", "bad"),
    [
        (plain.whole, [0, 7], [-1, 1.0, True, "1", None, 2**53]),
        (plain.positive, [1], [0, -1, 1.5]),
        (plain.truth, [True, False], [0, 1, "true", None]),
        (plain.text, ["", "a\nb"], [1, "x" * 2001, None]),
        (plain.name, ["site a"], ["", "a\nb", "x" * 201, 3]),
        (plain.settings, [{"lr": 0.1, "modules": ["q", "v"], "none": None}], [{"x": {}}, [], "x"]),
        (
            plain.metrics,
            [{"loss": 0.5, "per_class": {"a": {"f1": 1.0}}}],
            [{"x": []}, {"x": {"a": 1}}],
        ),
        (
            plain.metrics,
            [{"loss": None}],
            [{"per_class": {"a": {"f1": "1"}}}, {"x": {"a": {"b": True}}}],
        ),
    ],
)
def test_what_is_one_comes_back(
    reader: Callable[[Any], Any], good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert reader(value) == value
    for value in bad:
        with pytest.raises(ValueError, match=r"\w"):
            reader(value)


def test_names_and_shapes_become_tuples() -> None:
    assert plain.names(["b", "a"]) == ("b", "a")
    assert plain.shapes({"head": [3], "bias": []}) == {"head": (3,), "bias": ()}
    assert plain.module_shapes({"q": [3, 4]}) == {"q": (3, 4)}


@pytest.mark.parametrize(
    ("reader", "value"),
    [
        (plain.names, ["a", "a"]),
        (plain.names, ("a",)),
        (plain.shapes, {"q": [1] * 5}),
        (plain.shapes, {"q": [-1]}),
        (plain.module_shapes, {"q": [3]}),
        (plain.module_shapes, {"q": [3, 0]}),
    ],
)
def test_other_names_and_shapes_are_refused(reader: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        reader(value)


def test_long_ones_are_refused_before_they_are_read() -> None:
    entries = range(plain.MOST_ENTRIES + 1)
    for reader, value in (
        (plain.names, list(map(str, entries))),
        (plain.settings, dict.fromkeys(map(str, entries))),
        (plain.settings, {"x": list(entries)}),
    ):
        with pytest.raises(ValueError, match="long"):
            reader(value)

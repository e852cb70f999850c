"""One name for a module that adapters call by several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from torch import nn

from fedlora.adapters.names import Twin, common_names, find_twins
from fedlora.errors import InputError

OLD, NEW = "language_model.model.layers.0.q", "model.language_model.layers.0.q"


def no_model(twins: bool) -> Iterable[Any]:
    """Nothing is known of the base."""
    return ()


def test_names_that_agree_stay() -> None:
    named = [{"layers.0.q": (4, 3)}, {"layers.0.q": (4, 3), "layers.0.v": (4, 3)}]
    assert common_names(named, ["a", "b"], no_model) == [
        {"layers.0.q": "layers.0.q"},
        {"layers.0.q": "layers.0.q", "layers.0.v": "layers.0.v"},
    ]


def test_the_newer_of_two_documented_names_is_taken_in_either_order() -> None:
    for named in ([{OLD: (4, 3)}, {NEW: (4, 3)}], [{NEW: (4, 3)}, {OLD: (4, 3)}]):
        renamed = common_names(named, ["a", "b"], no_model)
        assert [list(names.values()) for names in renamed] == [[NEW], [NEW]]


def test_twins_that_nothing_documents_are_refused_by_their_names() -> None:
    named = [{"model.layers.0.q": (4, 3)}, {"layers.0.q": (4, 3)}]
    assert find_twins(named) == [Twin("model.layers.0.q", "layers.0.q")]
    with pytest.raises(InputError) as error:
        common_names(named, ["site-a", "site-b"], no_model)
    for part in ("model.layers.0.q", "layers.0.q", "site-a", "site-b"):
        assert part in str(error.value)


def test_the_base_says_what_a_name_became() -> None:
    """`layers.0.q` is `model.layers.0.q` in a model whose inner model is called `model`."""

    class Whole(nn.Module):
        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Module()
            self.model.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(3, 4)})])

    named = [{"model.layers.0.q": (4, 3)}, {"layers.0.q": (4, 3)}]
    renamed = common_names(named, ["a", "b"], lambda twins: [Whole()])
    assert [list(names.values()) for names in renamed] == [["model.layers.0.q"]] * 2


def test_a_wrappers_part_within_a_layer_makes_a_twin() -> None:
    named = [{"layers.0.q": (4, 3)}, {"layers.0.wrapped.q": (4, 3)}]
    assert find_twins(named) == [Twin("layers.0.q", "layers.0.wrapped.q")]

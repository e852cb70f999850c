"""Magnitude pruning against PEFT's own function on whole matrices, in float64."""

from __future__ import annotations

import pytest
import torch
from peft.utils.merge_utils import magnitude_prune

from fedlora import aggregate
from fedlora.methods.merges.magnitude_prune import MERGE
from support.dense_merges import in_the_common_space, whole
from support.merging import effect, made, same_effect

ADAPTERS = [
    made({"a": ((11, 7), 4), "b": ((6, 13), 2)}, 1),
    made({"a": ((11, 7), 2)}, 2),
    made({"a": ((11, 7), 3), "b": ((6, 13), 1)}, 3),
]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("density", [0.2, 0.45])
def test_it_is_pefts(density: float, raw: bool) -> None:
    weights = [0.5, -0.3, 0.2] if raw else [0.5, 0.3, 0.2]
    found = aggregate(ADAPTERS, weights, method=MERGE.name, raw_weights=raw, density=density)
    scaled = torch.tensor(weights).double()
    for name in ("a", "b"):
        wanted = in_the_common_space(
            whole(ADAPTERS, name), lambda x: magnitude_prune(x, scaled, density)
        )
        torch.testing.assert_close(effect(found)[name], wanted, rtol=1e-4, atol=1e-5)


def test_with_all_numbers_it_is_the_weighted_sum() -> None:
    found = aggregate(ADAPTERS, method=MERGE.name, density=1.0)
    same_effect(effect(found), effect(aggregate(ADAPTERS)), 1e-5)

"""Task singular vectors against the authors' computation on whole matrices, in float64."""

from __future__ import annotations

import pytest
import torch

from fedlora import aggregate
from fedlora.methods.merges.tsv import MERGE
from support.dense_merges import tsv, whole
from support.merging import effect, made

ADAPTERS = [
    made({"a": ((31, 27), 4), "b": ((6, 23), 2)}, 1),
    made({"a": ((31, 27), 2), "b": ((6, 23), 5)}, 2),
    made({"a": ((31, 27), 6)}, 3),
]


@pytest.mark.parametrize("name", ["a", "b"])
def test_it_is_that_of_the_whole_matrices(name: str) -> None:
    """Module b is so small that the paper's share of directions, 6 / 3, cuts an adapter's 5."""
    found = aggregate(ADAPTERS, method="tsv")
    wanted = tsv(whole(ADAPTERS, name), [1.0, 1.0, 1.0])
    torch.testing.assert_close(effect(found)[name], wanted, rtol=1e-4, atol=1e-5)
    assert found.weights == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("weights", "raw", "used"),
    [
        ([3.0, 1.0, 2.0], False, [1.5, 0.5, 1.0]),
        ([1.0, -0.5, 0.25], True, [1.0, -0.5, 0.25]),
    ],
)
def test_weights_scale_singular_values(weights: list[float], raw: bool, used: list[float]) -> None:
    found = aggregate(ADAPTERS, weights, method=MERGE.name, raw_weights=raw)
    wanted = tsv(whole(ADAPTERS, "a"), used)
    torch.testing.assert_close(effect(found)["a"], wanted, rtol=1e-4, atol=1e-5)


def test_adapters_that_do_not_overlap_are_added_up() -> None:
    parts = [made({"a": ((8, 8), 2)}, 1), made({"a": ((8, 8), 2)}, 2)]
    for place, part in enumerate(parts):
        x = part.deltas["a"]
        half = torch.arange(8).div(4, rounding_mode="floor") == place
        x.A[:, ~half] = 0
        x.B[~half] = 0
    found = aggregate(parts, method="tsv")
    wanted = sum(whole(parts, "a"), torch.zeros(8, 8).double())
    torch.testing.assert_close(effect(found)["a"], wanted, rtol=1e-5, atol=1e-6)


def test_an_adapter_twice_is_not_twice_as_strong_in_rank() -> None:
    """Directions that all share have no orthogonal copies; the polar factor is still defined."""
    part = ADAPTERS[0]
    found = aggregate([part, part], method="tsv")
    assert found.deltas["a"].rank == 4
    torch.testing.assert_close(effect(found)["a"], effect(part)["a"], rtol=1e-4, atol=1e-5)

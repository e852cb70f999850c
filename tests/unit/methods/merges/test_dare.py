"""DARE: seeds, the mean over draws, and whole matrices in float64."""

from __future__ import annotations

import pytest
import torch

from fedlora import aggregate
from fedlora.methods.merges.dare import MERGE, Options, kept
from support.dense_merges import in_the_common_space, whole
from support.merging import effect, made, same_effect

ADAPTERS = [
    made({"a": ((11, 7), 4), "b": ((6, 13), 2)}, 1),
    made({"a": ((11, 7), 2)}, 2),
    made({"a": ((11, 7), 3), "b": ((6, 13), 1)}, 3),
]


@pytest.mark.parametrize("seed", [0, 3])
def test_it_is_the_masked_sum_of_whole_matrices(seed: int) -> None:
    weights = (0.5, 0.3, 0.2)
    options = Options(density=0.7, seed=seed)
    found = aggregate(ADAPTERS, weights, method="dare", density=0.7, seed=float(seed))

    def merge(cores: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros_like(cores[0])
        for place, (weight, core) in enumerate(zip(weights, cores, strict=True)):
            total += weight * core * kept(tuple(core.shape), options, place, "a") / 0.7
        return total

    wanted = in_the_common_space(whole(ADAPTERS, "a"), merge)
    torch.testing.assert_close(effect(found)["a"], wanted, rtol=1e-4, atol=1e-5)


def test_a_seed_decides_and_another_draws_anew() -> None:
    first, again, other = (
        effect(aggregate(ADAPTERS, method="dare", density=0.5, seed=seed))["a"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_every_adapter_and_module_has_draws_of_its_own() -> None:
    options = Options(density=0.5)
    draws = [kept((20, 20), options, place, name) for place in (0, 1) for name in "ab"]
    assert not any(torch.equal(x, y) for i, x in enumerate(draws) for y in draws[:i])
    assert abs(float(torch.stack(draws).mean()) - 0.5) < 0.05


def test_the_mean_of_many_draws_is_the_weighted_sum() -> None:
    wanted = effect(aggregate(ADAPTERS))["a"]
    draws = [
        effect(aggregate(ADAPTERS, method="dare", density=0.8, seed=seed))["a"]
        for seed in range(60)
    ]
    errors = [
        float((torch.stack(draws[:n]).mean(0) - wanted).norm() / wanted.norm()) for n in (1, 60)
    ]
    assert errors[1] < errors[0] / 4


def test_nothing_dropped_is_the_weighted_sum() -> None:
    found = aggregate(ADAPTERS, method=MERGE.name, density=1.0)
    same_effect(effect(found), effect(aggregate(ADAPTERS)), 1e-5)


def test_a_seed_is_a_whole_number() -> None:
    with pytest.raises(ValueError, match=r"seed: 1\.5 is no whole number"):
        aggregate(ADAPTERS, method="dare", seed=1.5)

"""TIES against PEFT's own function on whole matrices, in float64."""

from __future__ import annotations

import pytest
import torch
from peft.utils.merge_utils import ties

from fedlora import aggregate
from fedlora.methods.merges.merge import Cores
from fedlora.methods.merges.ties import MERGE, Options
from support.dense_merges import in_the_common_space, whole
from support.merging import effect, made

ADAPTERS = [
    made({"a": ((11, 7), 4), "b": ((6, 13), 2)}, 1),
    made({"a": ((11, 7), 2), "b": ((6, 13), 3)}, 2),
    made({"a": ((11, 7), 3)}, 3),
]


@pytest.mark.parametrize("density", [None, 0.5, 1.0])
@pytest.mark.parametrize("name", ["a", "b"])
def test_alike_weights_are_the_papers_mean(name: str, density: float | None) -> None:
    given = {} if density is None else {"density": density}
    found = aggregate(ADAPTERS, method="ties", **given)
    wanted = in_the_common_space(
        whole(ADAPTERS, name), lambda x: ties(x, torch.ones(3).double(), density or 0.2)
    )
    torch.testing.assert_close(effect(found)[name], wanted, rtol=1e-4, atol=1e-5)


def test_raw_weights_scale_as_in_peft() -> None:
    weights = [2.0, 0.5, 1.0]
    found = aggregate(ADAPTERS, weights, method="ties", raw_weights=True, density=0.6)
    # PEFT elects signs before it weighs, we elect those of weighed numbers: so it is given these.
    scaled = torch.tensor(weights).double()

    def merge(cores: list[torch.Tensor]) -> torch.Tensor:
        weighed = [w * core for w, core in zip(scaled, cores, strict=True)]
        return ties(weighed, torch.ones(3).double(), 0.6)

    wanted = in_the_common_space(whole(ADAPTERS, "a"), merge)
    torch.testing.assert_close(effect(found)["a"], wanted, rtol=1e-4, atol=1e-5)


def test_shares_weigh_those_that_agree() -> None:
    cores = torch.tensor([[[1.0]], [[3.0]], [[-1.0]]]).double()
    weights = torch.tensor([0.5, 0.25, 0.25]).double()
    x = Cores(cores, weights, True, (1, 1), "a", (0, 1, 2))
    assert MERGE.combine(x, Options(density=1.0)).item() == pytest.approx(
        (0.5 * 1 + 0.25 * 3) / 0.75
    )
